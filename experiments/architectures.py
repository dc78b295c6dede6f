"""Every causal model type of the installed transformers through ports/huggingface.py, beside plain rows:

    python experiments/architectures.py [TYPE ...] > experiments/architectures.md

Each is tiny and random, in float64. The port chooses trunk and rows by itself; then the loss and every parameter's
gradient of DPO (one micro-batch) and TDPO2 are compared with those of two rows a pair, the model's own forward
and the formula written out here. TYPE@narrow has windows of 5 tokens, TYPE@decoder is_decoder.
"""

import inspect
import re
import sys
import time
from contextlib import contextmanager
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train  # isort: skip

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from data import Pair, collate, pack
from losses import LOSSES, knobs_of, token_kl
from plumbing.reference import Reference
from plumbing.errors import ConfigError
from ports.huggingface import Policy
from ports.huggingface_setup import check_numbers

V, LENGTHS = 300, [(20, 18, 2), (3, 25, 25), (12, 1, 7)]  # of prompt, chosen, rejected
SMALL = {  # value: the names of a config's fields, where their default is a number
    V: r"(unpadded_|decoder_)?vocab_size(_per_layer_input)?",
    32: r"hidden_size|d_model|n_embd|dim|(word_|\w+put_)?emb(ed|edding)?_(dim|size|proj_dim)|attention_hidden_size|lru_width|"
        r"max_source_positions",
    16: r"qk_head_dim|(moe|expert|shared|moe_shared_expert|shared_expert|shared_experts)_(intermediate|ffn_hidden)_size|"
        r"router_hidden_size|image_size",
    64: r"mamba_d_ssm|rel_extent",
    48: r"(dense_)?intermediate_size(_mlp)?|((en|de)coder_)?ffn_dim|n_inner|d_inner|dim_ff|dff|(ffn_hidden|feed_forward)_size",
    2: r"num_(hidden_|encoder_|decoder_)?layers|n_layers?|(en|de)coder_layers|num_blocks|num_(\w+_)?(key_value|kv)_heads|"
       r"(swa_|)num_key_value_heads|num_experts_per_tok(en)?|moe_topk|moe_k|n_mamba_heads|index_n_heads|type_vocab_size|"
       r"linear_num_key_heads|num_query_groups",
    8: r"(\w+_)?head_dim|dim_head|d_head|kv_channels|attention_head_size|(kv|q|o)_lora_rank|mamba_(n_heads|d_head|d_state|"
       r"num_heads|headdim|chunk_size)|ssm_state_size|state_size|rotary_dim|hidden_size_per_layer_input|chunk_size|d_rel|"
       r"ple_embed_dim|patch_size|num_mel_bins",
    4: r"num_(attention_)?heads|n_heads?|\w+_attention_heads|attention_heads|(num|n_routed|num_local|moe_num)_experts|\w+_rank|"
       r"\w*d_conv|linear_num(_value)?_heads|hc_lowrank",
    128: r"max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|context_length|max_target_positions|"
         r"original_max_position_embeddings",
    1: r"(n|num|moe_num)_shared_experts|n_group|topk_group|num_expert_group|mamba_n_?groups|n_groups|num_mem_blocks|"
       r"first_k_dense_replace|num_dense_layers",
    40: r"index_topk|(sliding_|attention_|keep_|)window(_size)?|sliding_window_size|attention_chunk_size|local_attention(_window_len)?"}
IDS = {"pad": 0, "bos": 1, "eos": 2, "sep": 2, "decoder_start": 1, "cls": 1, "mask": 3, "eod": 2}
LAYERS = {"L": "linear_attention", "F": "full_attention", "S": "sliding_attention", "C": "conv", "M": "mamba",
          "A": "attention", "H": "hybrid", "I": "indexed_attention"}
MLA, INDEXED = "num_key_value_heads=4", " ".join("indexer_" + x for x in (
    "n_heads=2", "kv_heads=1", "head_dim=8", "budget=32", "compress_ratio=4"))
FIXES = {  # fields that do not follow from the others: NAME=VALUE, also inside a part of the config
    "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa longcat_flash minicpm3 sarvam_mla "
    "dots3_note_text youtu kimi_linear": MLA, "bailing_hybrid": f"layer_group_size=2 {MLA}",
    "bamba": "attn_layer_indices=[1]", "granitemoehybrid": "layers=MA", "lfm2 lfm2_moe lfm3": "layers=CF",
    "deepseek_v2 ": "topk_method='greedy'", "cohere_compass_text": "layers=SF rope_parameters={k:dict("
    "rope_type='default',rope_theta=1e4)for(k)in['sliding_attention','full_attention']}",
    "dbrx": "attn_config.rope_theta=1e4 attn_config.kv_n_heads=2 attn_config.clip_qkv=8.0 ffn_config.ffn_hidden_size=48 "
            "ffn_config.hidden_size=32 ffn_config.moe_num_experts=4 ffn_config.moe_top_k=2",
    "dots1": "n_routed_experts=4 n_shared_experts=1 num_experts_per_tok=2 n_group=1 topk_group=1",
    "gemma3n_text": "num_hidden_layers=4 layers=SFSF num_kv_shared_layers=2 activation_sparsity_pattern=[.95,.95,0.,0.]",
    "gpt_neo": "attention_types=[[['global','local'],1]] intermediate_size=48", "jamba": "attn_layer_offset=1 "
    "attn_layer_period=2", "hunyuan_v1_moe hunyuan_v1_dense ministral nemotron": "head_dim=8", "nemotron ":
    "num_key_value_heads=2", "mamba2": "num_heads=8", "qwen3_5_moe_text qwen3_5_text qwen3_next kimi_linear ": "layers=LF",
    "qwen3_5 qwen3_5_moe": "text_config.layers=LF", "qwen4_exp_text": f"layers=LI {INDEXED}", "qwen4_exp":
    "text_config.layers=LI " + INDEXED.replace("indexer", "text_config.indexer"), "recurrent_gemma":
    "block_types=['recurrent','attention']", "reformer": "is_decoder=True axial_pos_embds=False", "dory":
    "num_hidden_layers=3 n_input_layers=1 n_recurrent_layers=1 n_output_layers=1", "zaya": "num_experts_per_tok=1",
    "xmod": "languages=['en_XX'] default_language='en_XX'", "xlstm": "hidden_size=64 embedding_dim=64 num_heads=4 "
    "chunk_size=16 qk_dim_factor=1.", "zamba zamba2": "num_hidden_layers=6 layers=MMHMMH attention_hidden_size=64 "
    f"attention_head_dim=16 n_mamba_heads=8 {MLA}", "phi3@longrope": "original_max_position_embeddings=30 rope_parameters="
    "dict(rope_type='longrope',rope_theta=1e4,short_factor=[1.]*4,long_factor=[4.]*4,factor=4.,"
    "original_max_position_embeddings=30)", "llama@dynamic": "max_position_embeddings=30 rope_parameters=dict("
    "rope_type='dynamic',rope_theta=1e4,factor=4.)", "rwkv@deep": "num_hidden_layers=8", "exaone4@narrow laguna@narrow "
    "smollm3@narrow qwen2@narrow": "layers=SF use_sliding_window=True"}


def small(cls, narrow):
    """The arguments of a small config of this class."""
    default = cls()
    names = {*default.to_dict(), *inspect.signature(cls.__init__).parameters, *getattr(cls, "__annotations__", {})}
    found = {}
    for name in sorted(names):
        value, token = default.to_dict().get(name), name.removesuffix("_token_id").removesuffix("_token_index")
        if isinstance(value, int | float) and not isinstance(value, bool):
            if token != name:
                found[name] = IDS.get(token, min(value, V - 1))
            for size, pattern in SMALL.items():
                if re.fullmatch(pattern, name):
                    found[name] = (8 if "chunk" in name else 5) if narrow and size == 40 else size
                    break
        elif isinstance(getattr(default, name, None), transformers.PreTrainedConfig):
            part = getattr(default, name)
            found[name] = small(type(part), narrow) | ({"model_type": part.model_type} if part.model_type else {})
    return found


def tiny(name, seed=0):
    """A random model of a type, in float64. Weights are large enough for every parameter to matter."""
    kind, _, variant = name.partition("@")
    arguments = small(CONFIG_MAPPING[kind], variant == "narrow") | ({"is_decoder": True} if variant == "decoder" else {})
    for names, fields in FIXES.items():
        for field in fields.split() if {kind, name} & {*names.split()} else ():
            path, _, value = field.partition("=")
            *parts, key = path.split(".")
            at = arguments
            for part in parts:
                at = at.setdefault(part, {})
            at["layer_types" if key == "layers" else key] = [LAYERS[x] for x in value] if key == "layers" else eval(value)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**arguments), experts_implementation="eager")
    model = model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return model


def random_pairs(lengths=LENGTHS):
    rng, pairs, none = np.random.default_rng(0), [], np.zeros((1, 0))
    for sides in lengths:
        ids = [rng.integers(4, V - 9, n).astype(np.int32) for n in sides]
        pairs.append(Pair(*ids, 0 * ids[1], 0 * ids[2], none, none, "here"))
    return pack(pairs)


@contextmanager
def float64_throughout():
    """transformers computes norms and rotations in float32 whatever the weights are."""
    single, method, default = torch.float32, torch.Tensor.float, torch.get_default_dtype()
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.float32 = torch.float = single
        torch.Tensor.float = method
        torch.set_default_dtype(default)


def plain_loss(model, reference, pair, cfg):
    """The loss of one pair by one row of the models' own logits for each response."""
    terms = {}
    for side in ("chosen", "rejected"):
        response = getattr(pair, side)
        row = torch.from_numpy(np.concatenate([pair.prompt, response])).long()
        z, z_ref = (m(input_ids=row[None]).logits[0, len(pair.prompt) - 1:-1] for m in (model, reference))
        y = row[len(pair.prompt):, None]
        terms[f"{side}_logps"], terms[f"ref_{side}_logps"] = (
            F.log_softmax(x, -1).gather(-1, y).sum()[None] for x in (z, z_ref.detach()))
        terms[f"{side}_seq_kl"] = token_kl(z_ref.detach(), z).sum()[None]
    return train.call(LOSSES[cfg.loss], terms, cfg).sum()


def compare(model, other, losses=("dpo", "tdpo2")):
    """(rows a pair, largest relative difference of the losses, of the gradients) of a model and a reference.
    ConfigError where the port refuses it."""
    off, pairs = {"loss": 0.0, "gradient": 0.0}, random_pairs()
    policy, reference = Policy(model), Policy(other.requires_grad_(False))
    check_numbers(policy, [pairs], config("dpo"), "it")
    reference.follow(policy)
    for loss in losses:
        cfg, size = config(loss), 1 if loss == "tdpo2" else len(pairs)
        ref = Reference(reference, lambda b, c=cfg: train.hidden_states(reference, b, c),
                        lambda b, c=cfg: train.response_logps(reference, b, c))
        plain = [plain_loss(model, other, pair, cfg) for pair in pairs]
        model.zero_grad()
        sum(plain).backward()
        expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        found = torch.cat([train.step(policy, ref, collate([pairs[j] for j in range(i, i + size)]), LOSSES[loss], 1.0,
                                      cfg)["loss"] for i in range(0, len(pairs), size)])
        plain = torch.stack(plain).detach()
        off["loss"] = max(off["loss"], ((found - plain).abs() / plain.abs()).max().item())
        for name, p in model.named_parameters():
            g, e = (torch.zeros_like(p) if x is None else x for x in (p.grad, expected.get(name)))
            off["gradient"] = max(off["gradient"], ((g - e).abs().max() / e.abs().max().clamp(min=1e-6)).item())
    return "one" if policy.shared else "two", *off.values()


def config(loss):
    return train.Config(loss=loss, settings=knobs_of(LOSSES[loss]), dtype="float64", device="cpu", compile=False,
                        compile_head=False, head_tokens=60, micro_batch_tokens=2048)


def main(names):
    names = names or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) + [x for n in FIXES for x in n.split() if "@" in x]
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, {date.today()}, {len(names)} types\n")
    print("| model type | rows a pair | loss | gradients | refused |\n|---|---|---|---|---|")
    for name in names:
        why, cells = "", [""] * 3
        try:
            with float64_throughout():
                model = tiny(name), tiny(name, 1)
            try:
                with float64_throughout():
                    rows, *off = compare(*model)
                cells = rows, *(f"{x:.0e}" for x in off)
            except Exception as e:
                why = f"{e}" if isinstance(e, ConfigError) else f"traceback: {type(e).__name__}: {e}"
        except Exception as e:
            why = f"not built here: {type(e).__name__}: {e}"
        print(f"| {name} | {' | '.join(cells)} | {' '.join(why.split()):.150} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
