"""Model FLOPs utilization: what a step needs by the formula of PaLM, against what the device's maker promises.

Not run by itself: throughput.py, gpu.py and step_profile.py divide by it. Only dense 16-bit peaks are listed, so there
is no MFU in float32, on a CPU, or of a device that is not in the table.
"""

import re

PEAKS = {  # dense 16-bit TFLOP/s that the makers state; the first entry found in the device's name counts
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200 NVL": 835, "H200": 989, "GH200": 989,  # of Hopper
    "A100": 312, "A40": 149.7, "RTX A6000": 155, "RTX 3090": 71,  # Ampere; an RTX A4000 is no A40
    "L40S": 362, "L4": 121, "RTX 4090": 165, "V100": 125, "T4": 65,  # Ada, Volta, Turing
}  # fmt: skip


def peak_of(device):
    """Return the TFLOP/s of a device by its name, such as "NVIDIA A40", in whole words; 0 for one not listed."""
    return next((peak for part, peak in PEAKS.items() if re.search(rf"\b{part}\b(?! Ti| D| Laptop)", device)), 0)


def peak_flops(args):
    """Return the 16-bit FLOP/s of all devices of a run (TrainingArguments); 0 if unlisted, on a CPU, in float32."""
    if args.device.type != "cuda" or args.mixed_precision == "no":
        return 0
    import torch

    return args.world_size * 1e12 * peak_of(torch.cuda.get_device_name(args.device))


def flops_per_token(model, length):
    """Return the FLOPs of training on a token of a chunk of so many: 6 a weight, and attention's; 1.73e9 for 270M.

    The formula is that of PaLM's appendix B (arXiv:2204.02311); of attention counts what causality and windows leave.
    """
    config = model.config.get_text_config()
    width = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    kinds = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers
    windows = {"sliding_attention": config.sliding_window or length}  # elsewhere the whole chunk
    seen = [min(length, windows.get(kind, length)) for kind in kinds]  # tokens each layer can look back
    back = sum(window - window * (window - 1) / 2 / length for window in seen)  # mean over tokens, all layers
    lookup = (not config.tie_word_embeddings) * config.vocab_size * config.hidden_size  # rows are only read
    return 6 * (model.num_parameters() - lookup) + 12 * width * config.num_attention_heads * back
