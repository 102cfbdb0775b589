"""CLIP checkpoints with the key names of each published layout, filled with random weights.

The mappings are written again here, by hand and apart from the package's, to be compared with.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor

TINY = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 128, "patch_size": 8},
    "text_cfg": {"context_length": 248, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
MEAN_STD = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
}
State = dict[str, Tensor]


def tiny(context_length: int = 248, quick_gelu: bool = True) -> dict:
    text = {**TINY["text_cfg"], "context_length": context_length}
    return {**TINY, "quick_gelu": quick_gelu, "text_cfg": text}


def network(config: dict, seed: int = 0) -> open_clip.CLIP:
    """A network whose biases and tables are not trivial."""
    torch.manual_seed(seed)
    model = open_clip.CLIP(**config).eval().requires_grad_(False)
    for name, value in model.named_parameters():
        if name.endswith("bias") or "ln_" in name:
            value += 0.1 * torch.randn_like(value)
        if name.endswith("positional_embedding"):
            value.copy_(0.3 * torch.randn_like(value))
    return model


def plain_state(model: torch.nn.Module) -> State:
    return {key: value.clone().contiguous() for key, value in model.state_dict().items()}


def openai(state: State) -> State:
    """As OpenAI's own files: three scalars beside the weights."""
    width, patch = state["visual.conv1.weight"].shape[0], state["visual.conv1.weight"].shape[-1]
    assert width
    side = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
    return {
        "input_resolution": torch.tensor(side * patch),
        "context_length": torch.tensor(len(state["positional_embedding"])),
        "vocab_size": torch.tensor(len(state["token_embedding.weight"])),
        **state,
    }


def start_of_long_clip(table: Tensor) -> Tensor:
    """Long-CLIP's stretch of 77 rows to 248, row by row as its authors describe it."""
    rows = [table[i] for i in range(20)]
    for i in range(20, len(table) - 1):
        rows += [(1 - f) * table[i] + f * table[i + 1] for f in (0, 0.25, 0.5, 0.75)]
    last, step = table[-1], table[-1] - table[-2]
    rows += [last + f * step for f in (0, 0.25, 0.5, 0.75)]
    return torch.stack(rows)


def long_clip(state: State) -> State:
    """Frozen first table, trained second one; `state` has what both fold to."""
    folded = state["positional_embedding"]
    source = torch.randn(20 + (len(folded) - 20) // 4, folded.shape[1])
    source[:20] = folded[:20]
    trained = folded.clone()
    trained[:20] = 7.0  # never read
    return {
        **state,
        "positional_embedding": start_of_long_clip(source),
        "positional_embedding_res": trained,
    }


def transformers(state: State) -> State:
    out: State = {}
    for key, value in state.items():
        name = key if key.startswith("visual.") else f"text.{key}"
        name = name.replace("visual.", "vision_model.").replace("text.", "text_model.")
        name = name.replace("transformer.resblocks", "encoder.layers")
        name = name.replace("attn", "self_attn").replace("mlp.c_fc", "mlp.fc1")
        name = name.replace("mlp.c_proj", "mlp.fc2").replace("conv1", "embeddings.patch_embedding")
        name = re.sub(r"ln_([12])", r"layer_norm\1", name)
        name = name.replace("ln_pre", "pre_layrnorm").replace("ln_post", "post_layernorm")
        name = name.replace("ln_final", "final_layer_norm")
        name = name.replace("model.class_embedding", "model.embeddings.class_embedding")
        name = name.replace("token_embedding", "embeddings.token_embedding")
        if name.endswith("positional_embedding"):
            name = name.replace("positional_embedding", "embeddings.position_embedding.weight")
        if "in_proj" in name:
            for which, part in zip("qkv", value.chunk(3), strict=True):
                out[name.replace("in_proj_", f"{which}_proj.")] = part.clone()
        elif key == "visual.proj":
            out["visual_projection.weight"] = value.T.contiguous()
        elif key == "text_projection":
            out["text_projection.weight"] = value.T.contiguous()
        else:
            out["logit_scale" if key == "logit_scale" else name] = value
    return out


def factored(state: State, layers: str) -> State:
    """Weights whose name matches `layers` as Q, Lambda, P, kernels as (out, rest) matrices."""
    out: State = {}
    for key, value in state.items():
        if not re.search(layers, key):
            out[key] = value
            continue
        prefix = key.removesuffix(".weight")
        matrix = value.T if key in ("visual.proj", "text_projection") else value.flatten(1)
        Q, Lambda, Pt = torch.linalg.svd(matrix.double(), full_matrices=False)
        for name, part in (("Q", Q), ("Lambda", Lambda), ("P", Pt.T)):
            out[f"{prefix}.{name}"] = part.float().contiguous()
    return out


def enn(state: State) -> State:
    """The image tower as the published eigen ViT has it: every map factored, q, k and v apart."""
    split: State = {}
    for key, value in state.items():
        if key.startswith("visual.") and "in_proj" in key:
            for which, part in zip("qkv", value.chunk(3), strict=True):
                split[key.replace("in_proj_", f"{which}_proj.")] = part.clone()
        else:
            split[key] = value
    return factored(split, r"^visual\..*(conv1|_proj|c_fc|c_proj)\.weight$|^visual\.proj$")


def enn_transformers(state: State) -> State:
    names = r"^vision_model.*(patch_embedding|_proj|fc\d)\.weight$|^visual_projection\.weight$"
    return factored(transformers(state), names)


LAYOUTS = {
    "open_clip": dict,
    "openai": openai,
    "long-clip": long_clip,
    "transformers": transformers,
    "enn": enn,
    "enn-long-clip": lambda state: enn(long_clip(state)),
    "enn-transformers": enn_transformers,
}


def save(state: State, path: Path) -> Path:
    state = {key: value.clone().contiguous() for key, value in state.items()}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


def write_architecture(path: Path, config: dict) -> Path:
    size = config["vision_cfg"]["image_size"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {"size": size, **MEAN_STD}}))
    return path


def transformers_config(config: dict) -> dict:
    """`config.json` of the CLIPModel that equals an open_clip configuration."""
    image, text = config["vision_cfg"], config["text_cfg"]
    act = "quick_gelu" if config["quick_gelu"] else "gelu"
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config["embed_dim"],
        "text_config": {
            "hidden_act": act,
            "hidden_size": text["width"],
            "intermediate_size": 4 * text["width"],
            "num_attention_heads": text["heads"],
            "num_hidden_layers": text["layers"],
            "max_position_embeddings": text["context_length"],
            "bos_token_id": 49406,
            "eos_token_id": 49407,
        },
        "vision_config": {
            "hidden_act": act,
            "hidden_size": image["width"],
            "intermediate_size": 4 * image["width"],
            "num_attention_heads": image["width"] // 64,
            "num_hidden_layers": image["layers"],
            "image_size": image["image_size"],
            "patch_size": image["patch_size"],
        },
    }
