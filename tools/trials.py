"""What main.py tries on the device at hand before it trusts it: each trial returns "" if all is well, else why not.

main.py names the functions that are tried, and goes on without what fails, with a note: slower, but not wrong.
"""
import torch  # main.py has loaded it
from torch.nn.functional import scaled_dot_product_attention as sdpa  # the judge of attention


def attention(windowed, config, device, dtype):  # windowed: main.py's windowed_attention()
    """Return "", or by how much the output and the three gradients of windowed() differ from those of sdpa in float32.

    config: of the model, with its window and its heads. dtype: bfloat16 or float16, in which windowed() computes.
    """
    length = config.sliding_window + 128  # T, 640 for Gemma 3: the last 128 tokens do not see all others
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)  # 4, 1 and 1
    noise = torch.Generator(device).manual_seed(0)  # of its own: the run's random numbers are left alone
    sizes = [(1, count, length, config.head_dim) for count in heads]  # of queries, keys and values
    parts = [torch.randn(size, device=device, generator=noise).to(dtype) for size in sizes]  # q, k, v
    at = torch.arange(length, device=device)  # places of the tokens
    scale = config.head_dim**-0.5  # query · key times this is a score
    upstream = parts[0][:, :, -128:]  # (1, heads, 128, D), d loss / d output: any numbers will do
    for window in (config.sliding_window, None):  # sliding layers, full layers
        leaves = [part.clone().requires_grad_() for part in parts]  # queries, keys, values in 16 bits
        out, _ = windowed(None, *leaves, None, scale, window)  # (1, T, heads, D)
        out = out.transpose(1, 2)[:, :, -128:]  # (1, heads, 128, D)
        ours = [out, *torch.autograd.grad(out, leaves, upstream)]  # output and three gradients
        leaves = [part.float().requires_grad_() for part in parts]  # the same numbers in float32
        mask = (at[:, None] >= at) & (at[:, None] - at < (window or length))  # (T, T): what a token may see
        with torch.autocast(device.type, enabled=False):  # the judge computes in float32
            out = sdpa(*leaves, attn_mask=mask, scale=scale, enable_gqa=True)[:, :, -128:]  # shaped as ours
        theirs = [out, *torch.autograd.grad(out, leaves, upstream.float())]  # output and three gradients
        errors = [((a - b).norm() / b.norm()).item() for a, b in zip(ours, theirs, strict=True)]  # relative
        error = max(errors)  # 0.005 by rounding; a window that is wrong by one token gives 0.04
        if not error < 0.02:  # nan fails, too
            return f"it differs from sdpa by {error:.1%}"  # on this device, in this version of torch
    return ""  # values and gradients are right

def softmax(plain, compiled, rows, head, dtype, softcap):  # plain: main.py's softmax_gradients()
    """Compile plain() and put it into the dict `compiled` under (kind of device, dtype), if it gives the same values.

    rows (int): R of the largest (R, V) logits. head (V, H): a tensor on the device. Returns: "", or what is wrong.
    """
    device, words = head.device, len(head)  # V, the size of the vocabulary
    noise = torch.Generator(device).manual_seed(0)  # of its own: the run's random numbers are left alone
    logits = torch.randn(rows, words, device=device, generator=noise, dtype=dtype)  # (R, V) noise
    targets = torch.arange(rows, device=device)[:, None] % words  # (R, 1): one label a row
    few = logits[:8].clone()  # (8, V): for the uncompiled function
    kernel = torch.compile(plain)  # two graphs: for evaluations and for training
    for tensor in (logits, targets):  # chunks have different numbers of tokens
        torch._dynamo.maybe_mark_dynamic(tensor, 0)  # R may change without compiling anew
    with torch.no_grad(), torch.autocast(device.type, enabled=False):  # as main.py's loss calls it
        kernel(logits, targets, softcap, False)  # compiles the graph of evaluations
        ours = (*kernel(logits, targets, softcap, True), logits)  # the graph of training: (R, 1), (R, 1), (R, V)
        theirs = (*plain(few, targets[:8], softcap, True), few)  # the same for eight tokens
    for one, other in zip(ours, theirs, strict=True):  # losses, gradients of labels, gradients of all words
        if not torch.allclose(one[:8].float(), other.float(), rtol=2e-2, atol=1e-7):  # bfloat16: 0.8 %
            return "it changes the values"  # on this device, in this version of torch
    compiled[device.type, dtype] = kernel  # in use from here on
    return ""  # values and gradients are right

def causal(model):  # model: on the CPU, in float32
    """Return "", or why a model cannot learn to predict the next token: in BERT, for one, tokens see those behind."""
    ids = torch.tensor([[*range(8)], [*range(7), 8]])  # (2, 8): two texts that differ in their last token
    with torch.no_grad():  # no gradients are wanted
        one, other = model(input_ids=ids).logits[:, :7]  # (7, V) each: what follows the first 7 tokens
    if (one - other).abs().max() > 1e-3 * one.std():  # a causal model answers the same
        return "its tokens see those behind them, so it cannot learn to predict the next one"  # it would copy
    return ""  # no token sees what it has to predict

def loss(config, head, own, forward):  # own: the model's forward(); forward: main.py's, with the chunked loss
    """Return "" if eight tokens cost the same by both losses, else why a model keeps its own. head: its last layer."""
    if not isinstance(head, torch.nn.Linear) or head.bias is not None:  # more than one matrix
        return "this model's own head holds all logits"  # as plain transformers does
    if getattr(config, "output_router_logits", False):  # a small part of the loss is for experts
        return "this model's own holds all logits, and shows a loss with a part for its experts"  # in training
    ids = torch.arange(8, device=head.weight.device)[None]  # (1, 8): enough to tell two losses apart
    with torch.no_grad():  # finds scaled logits, or a loss of experts
        theirs = own(ids, labels=ids).loss.float()  # scalar: mean loss by the model's own head
    ours = forward(ids, labels=ids)["loss"]  # scalar: mean loss by the chunked one, with its gradients
    same = torch.isclose(theirs, ours, rtol=1e-2, equal_nan=True)  # room for two roundings to 16 bits
    return "" if same.item() else "this model's own is another one, and holds all logits"  # scaled, say

# Layers are compiled one by one: two graphs, sliding and full, whatever the depth. The trial does so for the shape
# of a training batch. Nothing is compiled later: shorter batches and evaluations run uncompiled, without pause.
def layers(model, plan, plain, batch, length, options):  # batch, length: B and T; options: arguments of torch.compile
    """Compile the layers of a model on its device, or leave it as it was. plan: TrainingArguments.

    plain (bool): whether the chunked loss is in use. Returns: "", or why nothing is compiled. Raises: what the compiler
    raises.
    """
    lists = [part for part in model.base_model.children() if isinstance(part, torch.nn.ModuleList)]  # one list
    parts = [layer for part in lists for layer in part]  # 18 in Gemma 3 270M
    if not (plain and parts):  # a model of parts, such as one for pictures, or with a loss of its own
        return "it needs the chunked loss and a list of layers"  # nothing is compiled
    if plan.activation_checkpointing:  # as the Trainer will do it: else the trial might not fit
        kwargs = (plan.activation_checkpointing_kwargs or {}).items()  # of torch.utils.checkpoint
        kwargs = {key: value for key, value in kwargs if key not in ("every_n_layers", "offload")}  # torch's
        model.activation_checkpointing_enable(kwargs or None)  # None: torch's defaults
    torch._dynamo.config.optimize_ddp = False  # it would cut each graph where gradients are sent
    try:  # the compiler may be missing
        for layer in parts:  # names in checkpoints stay as they are
            layer.compile(**options)  # compiled at the first call
        width = model.get_input_embeddings().embedding_dim  # H: 640 numbers a token
        embedded = torch.zeros(batch, length, width, device=model.device, requires_grad=True)  # (B, T, H)
        out = model.train().base_model(inputs_embeds=embedded).last_hidden_state  # (B, T, H): forward
        torch.autograd.grad(out.float().sum(), embedded)  # backward; no weight gets a gradient
        torch.compiler.set_stance("eager_on_recompile")  # from here on nothing is compiled
    except Exception:  # of the compiler
        for layer in parts:  # as they were
            layer._compiled_call_impl = None  # what compile() has set
        raise  # main.py says why
    return ""  # all layers are compiled
