"""Flags of other trainers, and what stands in their place in main.py.

advice.py looks here when main.py meets an unknown flag: "unknown flag --block_size: here it is --max_seq_length; …".
Keys are in lower case, with underscores; names of YAML files are written as flags. docs/flags.md shows the table.
"""
# ── Clauses that several flags share ───────────────────────────────────────────────────────────────
HERE_MODEL = "here it is --model_name_or_path"  # a name of the hub or a directory
SHAPE = "not offered: the model is built as its config.json says"  # sizes, dropout and the like
TOKENIZER = "not offered: the tokenizer is the one that comes with the model"  # another one would need other embeddings
TOKEN = "not offered: log in once with hf auth login, or set the environment variable HF_TOKEN"  # for gated models
DATA = "here it is --dataset_name for a data set, --train_file for files"  # either, never both
TRAINFILE = "here it is --train_file"  # also folders and globs
VALFILE = "here it is --validation_file; of a --dataset_name its validation split is used"  # held out
SPLITS = "not offered: the splits named train and validation are used"  # of a data set
HOLDOUT = "here it is --validation_split_percentage, in percent of the texts"  # or --validation_file
STREAM = "not offered: data is prepared on disk and memory-mapped; it may be larger than memory"  # as fast
SHUFFLE = "not needed: each epoch has a new order, unless --train_sampling_strategy sequential; leave it out"  # new
LENGTH = "here it is --max_seq_length, the tokens of a chunk; texts are packed into chunks"  # the context
PACKED = "not needed: texts are always packed; leave it out"  # there is no other way
UNPADDED = "not needed: nothing is padded; leave it out"  # chunks are full
COUNTED = "not needed: texts are tokenized and counted, nothing is estimated; leave it out"  # the report tells all
EPOCHS = "here it is --num_train_epochs"  # passes over the data
MAXSTEPS = "here it is --max_steps"  # has priority over epochs
BATCH = "here it is --per_device_train_batch_size; a step takes --gradient_accumulation_steps of them"  # in chunks
EVALBATCH = "here it is --per_device_eval_batch_size"  # changes no result
WARMUP = "here it is --warmup_steps, where a value below 1 is a share of the run"  # steps or a share
CLIP = "here it is --max_grad_norm, which is 1.0 unless given; 0: no clipping"  # of the gradient
PRECISION = "here it is --bf16 or --fp16, over float32 weights; --save_dtype is for the result"  # autocast
APEX = "not needed: --bf16 and --fp16 use torch's own autocast; leave it out"  # a package of old
CHECKPOINTING = "here it is --gradient_checkpointing"  # recomputes
OFFLOAD = "not offered: --gradient_checkpointing recomputes activations instead"  # to the CPU's memory
FLASH = "here it is --use_flash_attention; on a GPU with --bf16 Gemma has torch's own without it"  # on a GPU
LIGER = "here it is --use_liger_kernel"  # its layers, not its loss
OUTPUT = "here it is --output_dir"  # one for each run
SAVESTEPS = "here it is --save_steps"  # or a share of the run
LOGSTEPS = "here it is --logging_steps"  # or a share of the run
RUNS = "not offered: curves are in the directory runs of --output_dir"  # where TensorBoard finds them
TRACKER = "not offered: set the tracker's environment variable, such as WANDB_PROJECT"  # of wandb and the like
EVALSTEPS = "here it is --eval_steps"  # or a share of the run
EARLY = "here it is --early_stopping_patience, in evaluations"  # the best one is kept
LAUNCH = "not offered: it is a flag of accelerate launch and goes before main.py"  # not of main.py
GPUS = "not offered: accelerate launch starts a process for each GPU; CUDA_VISIBLE_DEVICES chooses them"  # a rank each
WHOLEMODEL = "not offered: each process holds the whole model, 4.3 GB with gradients and Adam's state"  # small
TPU = "not offered: training runs on NVIDIA GPUs or on a CPU"  # nothing else was tried
OWNCHUNKS = "not needed: each process reads its own chunks; leave it out"  # by accelerate
WORKERS = "here it is --dataloader_num_workers; to tokenize --preprocessing_num_workers"  # two kinds of helpers
ADAPTER = "not offered: all weights are trained, without adapters"  # the model is small
MERGE = "not offered: merge the adapter into its model (merge_and_unload), and train that"  # one set of weights
QUANT = "not offered: weights are trained in float32; --bf16 halves the activations"  # updates would be lost
WRITES = "not offered: main.py only trains; a finished model writes with bash example_run.sh generate"  # in Python
CHAT = "not offered: texts go in as they are; write a conversation as one text, with its marks"  # for now raw text
PROMPT = "not offered: all tokens of a text are learnt, prompts too"  # for now raw text
PLAIN = "not offered: it trains on plain text, to predict the next token"  # one task

# ── The table ──────────────────────────────────────────────────────────────────────────────────────
FOREIGN = {  # flag → the clause behind "unknown flag --x: "; behind each line the trainers that have it
    # Model and tokenizer
    "--model": HERE_MODEL, "--model_path": HERE_MODEL,  # an abbreviation
    "--model_name": HERE_MODEL,  # Unsloth, an abbreviation
    "--base_model": HERE_MODEL,  # Axolotl
    "--model_type": "not needed: the model's config.json tells it; leave it out",  # run_clm, Axolotl, torchtune
    "--config_name": SHAPE, "--config_overrides": SHAPE,  # run_clm
    "--n_layer": SHAPE, "--n_head": SHAPE, "--n_embd": SHAPE, "--dropout": SHAPE,  # nanoGPT
    "--model_init_kwargs": SHAPE,  # TRL
    "--init_from": "here it is --model_name_or_path; a stopped run goes on by itself",  # nanoGPT
    "--checkpoint_dir": "here it is --model_name_or_path to read from, --output_dir to write to",  # LitGPT, torchtune
    "--tokenizer_name": TOKENIZER,  # run_clm
    "--tokenizer": TOKENIZER,  # torchtune
    "--tokenizer_type": TOKENIZER,  # Axolotl
    "--use_fast_tokenizer": "not needed: the tokenizer is always a fast one; leave it out",  # run_clm, LLaMA-Factory
    "--model_revision":  # run_clm, TRL, LLaMA-Factory
        "not offered: download that version, and give its directory to --model_name_or_path",
    "--token": TOKEN, "--use_auth_token": TOKEN,  # run_clm
    "--hf_token": TOKEN,  # an abbreviation
    "--trust_remote_code": "not offered: only models that transformers itself knows can be trained",  # run_clm, TRL
    "--low_cpu_mem_usage": "not needed: transformers 5 always loads so; leave it out",  # run_clm, Axolotl
    "--special_tokens":  # Axolotl
        "not offered: add them to the tokenizer and save it with the model; the embeddings grow",
    "--eos_token": "not offered: EOS is the tokenizer's; --add_eos puts it behind each text",  # TRL
    "--pad_token": UNPADDED,  # TRL
    "--add_eos_token": "here it is --add_eos",  # an abbreviation
    # Data
    "--data": DATA,  # LitGPT
    "--dataset": DATA,  # LLaMA-Factory, Unsloth, torchtune, nanoGPT
    "--datasets": DATA,  # TRL, Axolotl
    "--data_path": DATA, "--train_data": DATA,  # an abbreviation
    "--data_files": TRAINFILE,  # TRL, Axolotl
    "--raw_text_file": TRAINFILE,  # Unsloth
    "--data_dir": "here it is --dataset_name, which takes a directory of data files, too",  # TRL
    "--dataset_dir": "here it is --dataset_name, which takes a directory of data files, too",  # LLaMA-Factory
    "--dataset_config": "here it is --dataset_config_name",  # TRL
    "--dataset_train_split": SPLITS, "--dataset_test_split": SPLITS,  # TRL
    "--eval_dataset": VALFILE,  # LLaMA-Factory
    "--test_datasets": VALFILE,  # Axolotl
    "--val_file": VALFILE, "--eval_file": VALFILE,  # an abbreviation
    "--val_set_size": HOLDOUT,  # Axolotl
    "--val_size": HOLDOUT,  # LLaMA-Factory
    "--test_split_size": HOLDOUT,  # TRL
    "--dataset_text_field": "here it is --text_column",  # TRL, Unsloth
    "--text_column_name": "here it is --text_column",  # run_mlm and other examples
    "--text_field": "here it is --text_column", "--text_key": "here it is --text_column",  # an abbreviation
    "--field": "here it is --text_column", "--column": "here it is --text_column",  # Axolotl, torchtune
    "--line_by_line": "here it is --sample_by line, for .txt and .md files",  # run_mlm
    "--keep_linebreaks": "not needed: line breaks stay; leave it out",  # run_clm
    "--dataset_num_proc": "here it is --preprocessing_num_workers, a number of threads",  # TRL, Axolotl, Unsloth
    "--dataset_batch_size": "not needed: the tokenizer takes a megabyte of text at a time; leave it out",  # TRL
    "--dataset_kwargs": "not offered: texts go in as they are; prepare them in the file",  # TRL
    "--dataset_prepared_path": "here it is --cache_dir; prepared data is found there by itself",  # Axolotl
    "--max_samples": "here it is --max_train_samples, which counts chunks, not texts",  # LLaMA-Factory
    "--streaming": STREAM,  # run_clm, TRL, LLaMA-Factory, Axolotl
    "--dataset_streaming": STREAM,  # TRL
    "--shuffle": SHUFFLE,  # torchtune
    "--shuffle_dataset": SHUFFLE,  # TRL
    # Length and packing
    "--block_size":  # run_clm, nanoGPT
        "here it is --max_seq_length; add --no_truncation to keep long texts whole, as run_clm does",
    "--max_length": LENGTH,  # TRL
    "--sequence_len": LENGTH,  # Axolotl
    "--cutoff_len": LENGTH,  # LLaMA-Factory
    "--max_seq_len": LENGTH,  # torchtune
    "--chunk_size": LENGTH,  # Unsloth
    "--seq_len": LENGTH, "--context_length": LENGTH,  # an abbreviation
    "--packing": PACKED,  # TRL, LLaMA-Factory, Unsloth
    "--eval_packing": PACKED,  # TRL
    "--sample_packing": PACKED, "--eval_sample_packing": PACKED,  # Axolotl
    "--packed": PACKED,  # torchtune
    "--packing_strategy": "not offered: texts are packed end to end, in their order",  # TRL
    "--neat_packing": "not offered: the texts of a chunk see those before them",  # LLaMA-Factory
    "--padding_free": UNPADDED, "--pad_to_multiple_of": UNPADDED,  # TRL
    "--pad_to_sequence_len": UNPADDED,  # Axolotl
    "--group_by_length": "not needed: all chunks have the same length; leave it out",  # transformers 4, Axolotl
    "--truncation_mode": "not offered: a long text keeps its beginning, or with --no_truncation all of it",  # TRL
    "--num_of_sequences": COUNTED, "--chars_per_token": COUNTED,  # TRL
    # Epochs, batch, steps
    "--epochs": EPOCHS,  # torchtune, LitGPT
    "--num_epochs": EPOCHS,  # Axolotl
    "--max_iters": MAXSTEPS,  # nanoGPT
    "--max_train_steps": MAXSTEPS,  # run_clm_no_trainer
    "--max_tokens": "not offered: --max_steps ends the run; the plan it prints tells the tokens of a step",  # LitGPT
    "--per_gpu_train_batch_size": "here it is --per_device_train_batch_size",  # transformers 4
    "--per_gpu_eval_batch_size": EVALBATCH,  # transformers 4
    "--batch_size": BATCH,  # torchtune, nanoGPT
    "--micro_batch_size": BATCH,  # Axolotl, LitGPT
    "--train_batch_size": BATCH, "--bs": BATCH,  # an abbreviation
    "--global_batch_size":  # LitGPT
        "not offered: it is --per_device_train_batch_size x --gradient_accumulation_steps x processes",
    "--eval_batch_size": EVALBATCH,  # Axolotl
    "--grad_accum": "here it is --gradient_accumulation_steps",  # an abbreviation
    # Learning rate and optimizer
    "--lr": "here it is --learning_rate",  # torchtune, an abbreviation
    "--wd": "here it is --weight_decay",  # an abbreviation
    "--warmup_ratio": "here it is --warmup_steps, which takes a share such as 0.1, too",  # transformers 4
    "--num_warmup_steps": WARMUP,  # run_clm_no_trainer, torchtune
    "--warmup_iters": WARMUP,  # nanoGPT
    "--lr_warmup_steps": WARMUP,  # LitGPT
    "--warmup": WARMUP,  # an abbreviation
    "--lr_scheduler": "here it is --lr_scheduler_type, such as cosine",  # Axolotl, torchtune
    "--decay_lr": "not needed: the rate falls to 0 (--lr_scheduler_type constant: stays); leave it out",  # nanoGPT
    "--lr_decay_iters": "not needed: the rate falls until the last step; leave it out",  # nanoGPT
    "--min_lr":  # nanoGPT, LitGPT
        "here it is --lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs '{\"min_lr\": 1e-6}'",
    "--cosine_min_lr_ratio":  # Axolotl
        "here it is --lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs '{\"min_lr_rate\": 0.1}'",
    "--optimizer": "here it is --optim, such as adamw_torch or adafactor",  # Axolotl, torchtune, LitGPT
    "--adafactor": "here it is --optim adafactor",  # transformers 4
    "--beta1": "here it is --adam_beta1",  # nanoGPT
    "--beta2": "here it is --adam_beta2",  # nanoGPT
    "--grad_clip": CLIP,  # nanoGPT
    "--clip_grad_norm": CLIP,  # torchtune
    "--max_norm": CLIP,  # LitGPT
    # Precision and memory
    "--dtype": PRECISION,  # run_clm, TRL, Unsloth, torchtune, nanoGPT
    "--torch_dtype": PRECISION,  # run_clm, TRL
    "--precision": PRECISION,  # LitGPT
    "--mixed_precision": PRECISION,  # accelerate
    "--bfloat16": "here it is --bf16",  # Axolotl
    "--float16": "here it is --fp16",  # Axolotl
    "--fp32": "not needed: it is so without --bf16 and --fp16; leave it out",  # an abbreviation
    "--pure_bf16": "not offered: in bfloat16 weights lose small updates; --bf16 keeps them in float32",  # LLaMA-Factory
    "--fp16_opt_level": APEX, "--fp16_backend": APEX, "--half_precision_backend": APEX,  # transformers 4
    "--use_gradient_checkpointing": CHECKPOINTING,  # Unsloth
    "--enable_activation_checkpointing": CHECKPOINTING,  # torchtune
    "--gradient_checkpointing_use_reentrant": "not needed: it is False; leave it out",  # TRL
    "--activation_offloading": OFFLOAD,  # TRL, Axolotl
    "--enable_activation_offloading": OFFLOAD,  # torchtune
    # Attention and speed
    "--attn_implementation":  # TRL, Axolotl
        "not offered: attention is torch's own, or the package of --use_flash_attention",
    "--flash_attention": FLASH,  # Axolotl
    "--flash_attn": FLASH,  # LLaMA-Factory
    "--use_flash_attn": FLASH,  # an abbreviation
    "--use_liger": LIGER,  # TRL
    "--enable_liger_kernel": LIGER,  # LLaMA-Factory
    "--compile": "here it is --torch_compile",  # torchtune, nanoGPT
    "--torchdynamo": "here it is --torch_compile_backend, such as inductor",  # transformers 4
    "--jit_mode_eval": "not offered: on a CPU torch's own kernels are used",  # transformers 4
    "--use_ipex": "not offered: on a CPU torch's own kernels are used",  # transformers 4
    # Saving, going on, publishing
    "--out_dir": OUTPUT,  # nanoGPT, LitGPT
    "--save_path": OUTPUT,  # Unsloth
    "--output": OUTPUT, "--out": OUTPUT, "--save_dir": OUTPUT,  # an abbreviation
    "--save_interval": SAVESTEPS,  # LitGPT
    "--checkpointing_steps": SAVESTEPS,  # run_clm_no_trainer
    "--save_every": SAVESTEPS,  # an abbreviation
    "--saves_per_epoch":  # Axolotl
        "here it is --save_steps, where a value below 1 is a share of the whole run, not of an epoch",
    "--save_model": "not needed: the finished model is always saved, in --output_dir; leave it out",  # Unsloth
    "--save_method": "not needed: all of the model is saved, in the dtype of --save_dtype; leave it out",  # Unsloth
    "--save_safetensors": "not needed: it is always so; leave it out",  # transformers 4, Axolotl
    "--save_gguf": "not offered: llama.cpp converts the finished model",  # Unsloth
    "--resume": "not needed: the same command goes on (--resume_from_checkpoint: from another); leave it out",  # LitGPT
    "--auto_resume_from_checkpoints":  # Axolotl
        "not needed: the same command goes on from the newest checkpoint; leave it out",
    "--checkpoint": "here it is --resume_from_checkpoint; for a new run --model_name_or_path",  # an abbreviation
    "--ckpt": "here it is --resume_from_checkpoint; for a new run --model_name_or_path",  # an abbreviation
    "--push_to_hub_model_id": "here it is --hub_model_id, beside --push_to_hub",  # transformers 4
    "--push_to_hub_organization": "here it is --hub_model_id, as organization/name",  # transformers 4
    "--push_to_hub_token": "here it is --hub_token",  # transformers 4
    # Logging
    "--logging_dir": RUNS,  # transformers 4
    "--log_dir": RUNS,  # torchtune, an abbreviation
    "--log_interval": LOGSTEPS,  # nanoGPT, LitGPT
    "--log_every_n_steps": LOGSTEPS,  # torchtune, Lightning
    "--log_every": LOGSTEPS,  # an abbreviation
    "--logger_name": "here it is --report_to, such as tensorboard or wandb",  # LitGPT
    "--use_wandb": "here it is --report_to wandb",  # Axolotl
    "--wandb_log": "here it is --report_to wandb",  # nanoGPT
    "--wandb": "here it is --report_to wandb",  # an abbreviation
    "--wandb_project": TRACKER,  # Axolotl, nanoGPT
    "--wandb_log_model": TRACKER,  # Axolotl
    "--wandb_name": "here it is --run_name, with --report_to wandb",  # Axolotl
    "--wandb_run_name": "here it is --run_name, with --report_to wandb",  # nanoGPT
    "--include_tokens_per_second":  # transformers 4, Axolotl
        "not needed: each log line has tokens_per_second; leave it out",
    "--log_peak_memory_stats": "not needed: each log line has peak_memory_gb; leave it out",  # torchtune
    "--plot_loss": "not needed: tensorboard draws the curves; leave it out",  # LLaMA-Factory
    # Evaluation
    "--evaluation_strategy": "here it is --eval_strategy",  # transformers 4
    "--eval_interval": EVALSTEPS,  # nanoGPT
    "--eval_every": EVALSTEPS,  # an abbreviation
    "--evals_per_epoch":  # Axolotl
        "here it is --eval_steps, where a value below 1 is a share of the whole run, not of an epoch",
    "--eval_iters": "here it is --max_eval_samples, which counts chunks, not batches",  # nanoGPT
    "--eval_only": "here it is --do_eval, without --do_train",  # nanoGPT
    "--final_validation": "not needed: with validation data the finished model is evaluated; leave it out",  # LitGPT
    "--patience": EARLY,  # an abbreviation
    "--include_inputs_for_metrics":  # transformers 4
        "not offered: an evaluation gives loss, perplexity and bits per byte",
    "--use_legacy_prediction_loop": "not needed: there is one way to evaluate; leave it out",  # transformers 4
    "--past_index": "not offered: nothing is carried from one chunk to the next",  # transformers 4
    # Devices and processes
    "--no_cuda": "here it is --use_cpu",  # transformers 4
    "--cpu": "here it is --use_cpu",  # an abbreviation
    "--device": "not offered: CUDA_VISIBLE_DEVICES chooses the GPU, --use_cpu the CPU",  # torchtune, nanoGPT
    "--devices": GPUS,  # LitGPT, Lightning
    "--gpus": GPUS, "--num_gpus": GPUS,  # an abbreviation
    "--num_nodes": "not offered: run_node0.sh and run_node1.sh start a run on two machines",  # LitGPT
    "--num_processes": LAUNCH, "--num_machines": LAUNCH, "--machine_rank": LAUNCH,  # accelerate
    "--main_process_ip": LAUNCH,  # accelerate
    "--nproc_per_node": "not offered: it is a flag of torchrun and goes before main.py",  # torchrun
    "--backend": "here it is --ddp_backend, for several processes",  # nanoGPT
    "--xpu_backend": "here it is --ddp_backend, for several processes",  # transformers 4
    "--sharded_ddp": WHOLEMODEL, "--model_parallel": WHOLEMODEL, "--mp_parameters": WHOLEMODEL,  # transformers 4
    "--tp_size": WHOLEMODEL,  # transformers 4
    "--fsdp_min_num_params": WHOLEMODEL, "--fsdp_transformer_layer_cls_to_wrap": WHOLEMODEL,  # transformers 4
    "--device_map": WHOLEMODEL,  # Axolotl, Unsloth
    "--split_batches": OWNCHUNKS, "--dispatch_batches": OWNCHUNKS,  # transformers 4
    "--ignore_bias_buffers": "not needed: steps send no buffers between processes; leave it out",  # TRL
    "--tpu_num_cores": TPU, "--tpu_metrics_debug": TPU, "--use_mps_device": TPU,  # transformers 4
    "--ray_scope": "not offered: there is no search over settings",  # transformers 4
    "--num_workers": WORKERS, "--workers": WORKERS,  # an abbreviation
    # Adapters and quantization
    "--use_peft": ADAPTER, "--lora_task_type": ADAPTER, "--lora_target_parameters": ADAPTER,  # TRL
    "--lora_r": ADAPTER, "--lora_alpha": ADAPTER, "--lora_dropout": ADAPTER,  # TRL, Axolotl
    "--lora_target_modules": ADAPTER, "--lora_modules_to_save": ADAPTER,  # TRL, Axolotl
    "--use_rslora": ADAPTER, "--use_dora": ADAPTER,  # TRL, LLaMA-Factory
    "--adapter": ADAPTER, "--lora_target_linear": ADAPTER,  # Axolotl
    "--finetuning_type": ADAPTER, "--lora_rank": ADAPTER, "--lora_target": ADAPTER,  # LLaMA-Factory
    "--r": ADAPTER,  # Unsloth
    "--lora": ADAPTER, "--use_lora": ADAPTER,  # an abbreviation
    "--lora_model_dir": MERGE,  # Axolotl
    "--adapter_name_or_path": MERGE,  # LLaMA-Factory
    "--full_finetuning": "not needed: all weights are always trained; leave it out",  # Unsloth
    "--load_in_8bit": QUANT, "--load_in_4bit": QUANT,  # TRL, Axolotl, Unsloth
    "--bnb_4bit_quant_type": QUANT, "--use_bnb_nested_quant": QUANT, "--bnb_4bit_quant_storage": QUANT,  # TRL
    "--quantization_bit": QUANT,  # LLaMA-Factory
    # Generation and chat
    "--predict_with_generate": WRITES, "--generation_max_length": WRITES,  # Seq2SeqTrainingArguments
    "--max_new_tokens": WRITES, "--temperature": WRITES,  # LLaMA-Factory, LitGPT
    "--chat_template_path": CHAT,  # TRL
    "--chat_template": CHAT,  # Axolotl
    "--template": CHAT,  # LLaMA-Factory
    "--completion_only_loss": PROMPT, "--assistant_only_loss": PROMPT,  # TRL
    "--train_on_inputs": PROMPT,  # Axolotl
    "--train_on_prompt": PROMPT,  # LLaMA-Factory
    "--stage": PLAIN,  # LLaMA-Factory
    "--rl": PLAIN,  # Axolotl
    "--loss_type": PLAIN,  # TRL
    "--router_aux_loss_coef": "not offered: a mixture of experts has what its config.json says",  # TRL
    # Other
    "--random_state": "here it is --seed",  # Unsloth
    "--random_seed": "here it is --seed",  # an abbreviation
    "--config_file": "here it is --config, with one flag a line",  # accelerate, an abbreviation
}
