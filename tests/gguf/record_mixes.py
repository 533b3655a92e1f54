"""Record which types llama.cpp's own quantizer gives the tensors of small models, in ``recorded/mixes.json``.

    pip install --no-deps --target FOLDER llama-cpp-py-sync==0.11739
    python -m tests.gguf.record_mixes FOLDER/llama_cpp_py_sync

(It needs glibc 2.38.) Every model is a float16 file with as few numbers as possible: names, row lengths and metadata are all that
types depend on.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import re
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np

from qmerge.gguf.mixes import DENSE_TYPES, FILE_TYPES, Model, Shape

RECORD = Path(__file__).parent / "recorded" / "mixes.json"
WITH_IMPORTANCE = " with importance"

LIKE_LLAMA = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


def dense(
    layers: int, locals_: tuple[str, ...] = LIKE_LLAMA, columns: int = 256, wide: int = 512, tied: bool = False
) -> dict[str, Shape]:
    """Name → shape of the tensors of a model whose layers have these weights."""
    shapes: dict[str, Shape] = {"token_embd.weight": (2, columns), "output_norm.weight": (columns,)}
    if not tied:
        shapes["output.weight"] = (2, columns)
    for layer in range(layers):
        shapes[f"blk.{layer}.attn_norm.weight"] = (columns,)
        for local in locals_:
            row = wide if "ffn_down" in local else columns
            shapes[f"blk.{layer}.{local}.weight"] = (2, 2, row) if "exps" in local else (2, row)
    return shapes


def hybrid(layers: int) -> dict[str, Shape]:
    """Attention in every fourth layer, convolutions in the others."""
    shapes = dense(layers, ("ffn_gate", "ffn_up", "ffn_down", "shortconv.conv", "shortconv.in_proj"))
    for layer in range(3, layers, 4):
        shapes.update({f"blk.{layer}.{local}.weight": (2, 256) for local in LIKE_LLAMA[:4]})
    return shapes


MODELS: dict[str, tuple[Model, dict[str, Shape]]] = {
    "llama": (Model(arch="llama", layers=32, heads=32, kv_heads=8), dense(32)),
    "llama-tied": (Model(arch="llama", layers=30, heads=9, kv_heads=3), dense(30, tied=True)),
    "llama-rows-of-576": (Model(arch="llama", layers=18, heads=9, kv_heads=3), dense(18, columns=576, wide=1536)),
    "llama-rows-of-576-tied": (Model(arch="llama", layers=9, heads=9, kv_heads=3), dense(9, columns=576, tied=True)),
    "llama-70b": (Model(arch="llama", layers=80, heads=64, kv_heads=8), dense(80, ("attn_v", "ffn_down"))),
    "llama-65b": (Model(arch="llama", layers=80, heads=64, kv_heads=64), dense(80, ("attn_v", "ffn_down"))),
    "qwen2-72b": (Model(arch="qwen2", layers=80, heads=64, kv_heads=8), dense(80, ("attn_v", "ffn_down"))),
    "mixtral": (
        Model(arch="llama", layers=32, heads=32, kv_heads=8, experts=8),
        dense(32, (*LIKE_LLAMA[:4], "ffn_gate_inp", *EXPERTS)),
    ),
    "qwen3moe": (
        Model(arch="qwen3moe", layers=24, heads=32, kv_heads=4, experts=128),
        dense(24, (*LIKE_LLAMA[:4], "ffn_gate_inp", *EXPERTS)),
    ),
    "qwen2moe": (
        Model(arch="qwen2moe", layers=24, heads=16, kv_heads=16, experts=60),
        dense(24, (*LIKE_LLAMA[:4], "ffn_gate_inp", "ffn_gate_inp_shexp", "ffn_down_shexp", *EXPERTS)),
    ),
    "phi3": (
        Model(arch="phi3", layers=32, heads=32, kv_heads=32),
        dense(32, ("attn_qkv", "attn_output", "ffn_up", "ffn_down")),
    ),
    "falcon": (
        Model(arch="falcon", layers=32, heads=71, kv_heads=1),
        dense(32, ("attn_qkv", "attn_output", "ffn_up", "ffn_down")),
    ),
    "deepseek2": (
        Model(arch="deepseek2", layers=27, heads=16, kv_heads=16, experts=64),
        dense(27, ("attn_q", "attn_kv_a_mqa", "attn_kv_b", "attn_output", "ffn_gate_inp", "ffn_down_shexp", *EXPERTS)),
    ),
    "lfm2": (Model(arch="lfm2", layers=16, heads=32, kv_heads=8), hybrid(16)),
    "gemma3": (Model(arch="gemma3", layers=26, heads=4, kv_heads=1), dense(26, columns=640, wide=1024, tied=True)),
}

# Keys of ``general.architecture``'s own that llama.cpp asks for, apart from those of every model.
MORE_KEYS: dict[str, dict[str, int | float | bool]] = {
    "qwen3moe": {"expert_feed_forward_length": 256},
    "qwen2moe": {"expert_feed_forward_length": 256, "expert_shared_feed_forward_length": 256},
    "deepseek2": {
        "leading_dense_block_count": 0, "expert_feed_forward_length": 256, "expert_shared_count": 1,
        "expert_weights_scale": 1.0, "attention.kv_lora_rank": 512, "rope.dimension_count": 64,
    },
    "phi3": {"attention.sliding_window": 0},
    "lfm2": {"shortconv.l_cache": 3},
    "gemma3": {"attention.sliding_window": 512},
}  # fmt: skip


def write(path: Path, model: Model, shapes: dict[str, Shape]) -> None:
    """A float16 file, with float32 for vectors."""
    writer = gguf.GGUFWriter(path, model.arch)
    writer.add_block_count(model.layers)
    writer.add_context_length(512)
    writer.add_embedding_length(256 * model.heads)
    writer.add_feed_forward_length(512)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    if model.experts:
        writer.add_expert_count(model.experts)
        writer.add_expert_used_count(2)
    for key, value in MORE_KEYS.get(model.arch, {}).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(f"{model.arch}.{key}", value)
    generator = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = generator.standard_normal(shape)
        is_float32 = len(shape) < 2 or "ffn_gate_inp" in name or "shortconv.conv" in name
        writer.add_tensor(name, values.astype(np.float32 if is_float32 else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Importance(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.POINTER(ctypes.c_float)), ("size", ctypes.c_size_t))


class Parameters(ctypes.Structure):
    """llama_model_quantize_params of build 11739."""

    _fields_ = (
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int),
        ("output_tensor_type", ctypes.c_int),
        ("token_embedding_type", ctypes.c_int),
        ("allow_requantize", ctypes.c_bool),
        ("quantize_output_tensor", ctypes.c_bool),
        ("only_copy", ctypes.c_bool),
        ("pure", ctypes.c_bool),
        ("keep_split", ctypes.c_bool),
        ("dry_run", ctypes.c_bool),
        ("imatrix", ctypes.POINTER(Importance)),
        ("kv_overrides", ctypes.c_void_p),
        ("tt_overrides", ctypes.c_void_p),
        ("prune_layers", ctypes.c_void_p),
        ("max_buf_size", ctypes.c_size_t),
    )


def load(folder: Path) -> ctypes.CDLL:
    """llama.cpp's library."""
    for part in ("libggml-base.so.0", "libggml-cpu.so.0", "libggml-rpc.so.0", "libggml.so.0"):
        ctypes.CDLL(str(folder / part), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(folder / "libllama.so"))
    library.llama_model_quantize_default_params.restype = Parameters
    library.llama_model_quantize.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Parameters))
    return library


def types_by_llama_cpp(library: ctypes.CDLL, source: Path, file_type: int, has_importance: bool) -> dict[str, str]:
    """Name → type of every tensor, after quantization."""
    parameters = library.llama_model_quantize_default_params()
    parameters.nthread = 1
    parameters.ftype = file_type
    if has_importance:
        one = (ctypes.c_float * 1)(1.0)
        entries = (Importance * 2)(Importance(b"none.weight", one, 1), Importance(None, None, 0))
        parameters.imatrix = entries
    target = source.with_suffix(".quantized")
    if library.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters)):
        raise RuntimeError(f"llama.cpp refused {source.name}, file type {file_type}")
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(target).tensors}


def by_kind(types: dict[str, str]) -> dict[str, str]:
    """Name without its layer → types, layer by layer, as runs: ``Q6_K*4 Q4_K*28``."""
    kinds: dict[str, list[str]] = {}
    for name, type_ in types.items():
        kinds.setdefault(re.sub(r"^blk\.\d+\.", "", name), []).append(type_)
    return {kind: runs(types) for kind, types in kinds.items()}


def runs(types: list[str]) -> str:
    return " ".join(f"{name}*{len(list(run))}" for name, run in itertools.groupby(types))


def record(library: ctypes.CDLL, model: Model, shapes: dict[str, Shape]) -> dict[str, dict[str, str]]:
    """Mix → types; a second entry with importance where it makes a difference."""
    made: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        write(source, model, shapes)
        for mix, file_type in FILE_TYPES.items():
            if mix.upper() in DENSE_TYPES:
                continue
            types = types_by_llama_cpp(library, source, file_type, has_importance=False)
            made[mix] = by_kind({name: types[name] for name in shapes})
            types = types_by_llama_cpp(library, source, file_type, has_importance=True)
            with_importance = by_kind({name: types[name] for name in shapes})
            if with_importance != made[mix]:
                made[mix + WITH_IMPORTANCE] = with_importance
    return made


def main() -> None:
    library = load(Path(sys.argv[1]))
    made = {name: record(library, model, shapes) for name, (model, shapes) in MODELS.items()}
    lines = json.dumps(made).replace('"}, ', '"},\n').replace("}}, ", "}},\n")
    RECORD.write_text(lines + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
