"""Load a model and its tokenizer: the packaged demo, a local folder, or a Hugging Face id."""

from __future__ import annotations

import importlib.util
import logging
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, get_args

import torch
from huggingface_hub import constants
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from bh_routing.demo import demo_folder
from bh_routing.errors import InputError, ModelError
from bh_routing.models.experts import use_sparse_experts
from bh_routing.models.families import family_of
from bh_routing.models.routers import find_routers, widen_what_was_left, widening_of

log = logging.getLogger(__name__)

DEMO: Final = "demo"
"""Name of the packaged checkpoint; takes precedence over a folder of that name."""
DeviceName = Literal["auto", "cuda", "cpu"]
DtypeName = Literal["auto", "bfloat16", "float16", "float32"]
DeviceMapName = Literal["auto"]
_HUB_TIMEOUT_SEC = 5.0
_NO_TOKENIZER: Final = (
    "model {!r} has no tokenizer: tokenizer.json, or the vocabulary in another form, is missing or "
    "damaged; put the tokenizer's files next to config.json, as tokenizer.save_pretrained does"
)


class LoadedModel(NamedTuple):
    """A model in evaluation mode, and the tokenizer saved with it."""

    model: Any
    tokenizer: PreTrainedTokenizerBase


def load_model(
    name: str,
    *,
    device: DeviceName = "auto",
    dtype: DtypeName = "auto",
    device_map: DeviceMapName | None = None,
) -> LoadedModel:
    """Load a mixture-of-experts language model; of a multimodal one, all parts.

    FP8 and MXFP4 checkpoints are dequantised to `dtype` on loading. Only safetensors are read,
    and no code from the checkpoint is run.

    Args:
        name: `demo`, a folder with a checkpoint, or a Hugging Face id.
        device: device of the model; `auto` is CUDA if available, else CPU.
        dtype: type of the parameters; `auto` is bfloat16 on CUDA, float32 on CPU.
        device_map: `auto` spreads the layers over all GPUs, for a model larger than one GPU; None
            puts the model on one device.
    Returns:
        The model, with gradients disabled, and its tokenizer.
    Raises:
        ModelError: the model can't be found, reached, loaded or routed.
        InputError: device, dtype or device_map isn't a name listed above, or CUDA or accelerate
            isn't available.
    Example:
        >>> model, tokenizer = load_model("demo", device="cpu")
        >>> model.config.model_type
        'olmoe'
    """
    target = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, target)
    _check_device_map(device_map, device)
    source, options = source_of(name)
    try:
        tokenizer, model, report = _read(source, torch_dtype, device_map, options)
    except (ModelError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers may raise anything on an untested checkpoint
        raise ModelError(_explain(name, options, error)) from error
    _reject_incomplete(name, report)
    vocabulary = model.config.get_text_config().vocab_size
    if len(tokenizer) > vocabulary:
        raise ModelError(
            f"the tokenizer of {name!r} has {len(tokenizer)} tokens, the model's vocabulary "
            f"{vocabulary}; they don't belong together: save both from one checkpoint"
        )
    if device_map is None:
        model.to(target)
    else:
        _reject_offloaded(name, model, target)
    model.eval().requires_grad_(False)
    routers = find_routers(model)
    if target.type == "cpu":
        use_sparse_experts(model, [site.experts for site in routers.sites])
    return LoadedModel(model, tokenizer)


def read_config(name: str) -> PretrainedConfig:
    """Read the config.json of a model, named as in `load_model`, without its weights.

    Raises:
        ModelError: the model can't be found or reached, or its family isn't supported.
    """
    source, options = source_of(name)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(source, **options)
    except Exception as error:  # transformers may raise anything on an untested checkpoint
        raise ModelError(_explain(name, options, error)) from error
    family_of(config.model_type)
    auto_class(config)
    return config


_DENOISING: Final = frozenset({"diffusion_gemma"})
"""Families that denoise whole blocks: they have no loss of a next token and no decode step."""


def auto_class(config: PretrainedConfig) -> Any:
    """Return the transformers auto class that loads this configuration for generation."""
    if config.model_type not in _DENOISING:
        if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
            return AutoModelForCausalLM
        if type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING:
            return AutoModelForMultimodalLM
    raise ModelError(
        f"model type {config.model_type!r} generates no text token by token; give a causal "
        "language model, such as demo"
    )


def source_of(name: str) -> tuple[str, dict[str, Any]]:
    """Return the folder or hub id, and the keyword arguments for transformers."""
    source = str(demo_folder()) if name == DEMO else name
    options: dict[str, Any] = {"trust_remote_code": False}
    if not _is_folder(source):
        options["local_files_only"] = not hub_answers()
    return source, options


def _read(
    source: str, dtype: torch.dtype, device_map: str | None, options: Mapping[str, Any]
) -> tuple[PreTrainedTokenizerBase, Any, Mapping[str, Any]]:
    """Return tokenizer, model, and transformers' report of missing and mismatched weights."""
    transformers_logging.disable_progress_bar()
    verbosity = transformers_logging.get_verbosity()
    # Replaces transformers' tables of mismatched weights: we report them in one sentence.
    transformers_logging.set_verbosity_error()
    try:
        config = AutoConfig.from_pretrained(source, **options)
        family_of(config.model_type)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        # If its files are missing, transformers returns a tokenizer with an empty vocabulary.
        if len(tokenizer) <= len(tokenizer.added_tokens_decoder):
            raise ModelError(_NO_TOKENIZER.format(source))
        widening = widening_of(source, config)
        model, report = auto_class(config).from_pretrained(
            source,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            device_map=device_map,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **widening,
            **options,
        )
        if widening:
            widen_what_was_left(model, dtype)
        return tokenizer, model, report
    finally:
        transformers_logging.set_verbosity(verbosity)


def _reject_incomplete(name: str, report: Mapping[str, Any]) -> None:
    """Raise ModelError if weights are missing: transformers would initialise them at random."""
    if mismatched := sorted(report["mismatched_keys"]):
        key, there, here = mismatched[0]
        raise ModelError(
            f"weight {key!r} of {name!r} has shape {tuple(there)}, its config.json asks for "
            f"{tuple(here)}; they don't belong together: save both from one model"
        )
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"checkpoint {name!r} lacks {len(missing)} weights of the model, such as "
            f"{missing[0]!r}; get the whole checkpoint, with the config.json that belongs to it"
        )


def resolve_device(device: str) -> torch.device:
    """Return the device for `auto`, `cuda` or `cpu`; InputError if it isn't available."""
    if device not in get_args(DeviceName):
        raise InputError(f"device must be one of auto, cuda, cpu; got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device 'cuda' was asked for, but torch sees no GPU; use device=\"cpu\"")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the dtype of a name; `auto` is bfloat16 on CUDA and float32 on CPU."""
    if dtype not in get_args(DtypeName):
        raise InputError(f"dtype must be one of {', '.join(get_args(DtypeName))}; got {dtype!r}")
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "float32": torch.float32,
    }[dtype]


def _check_device_map(device_map: str | None, device: str) -> None:
    if device_map not in (None, *get_args(DeviceMapName)):
        raise InputError(f"device_map must be auto or left out, got {device_map!r}")
    if device_map is None:
        return
    if device == "cpu":
        raise InputError('device_map="auto" spreads a model over GPUs; leave out device="cpu"')
    if importlib.util.find_spec("accelerate") is None:
        raise InputError(
            'device_map="auto" needs the package accelerate; run: pip install accelerate'
        )


def _reject_offloaded(name: str, model: Any, target: torch.device) -> None:
    """Raise ModelError if some layers don't fit onto the GPUs."""
    places = getattr(model, "hf_device_map", {}).values()
    num_away = sum(place in ("cpu", "disk") for place in places)
    if target.type == "cuda" and num_away:
        raise ModelError(
            f"{num_away} of {len(places)} parts of model {name!r} don't fit onto the "
            f"{torch.cuda.device_count()} GPUs and would be fetched anew for each token; use more "
            'or larger GPUs, or leave out dtype="float32"'
        )


def _is_folder(source: str) -> bool:
    if not source.strip():
        raise ModelError('the model\'s name is empty; give one, such as model="demo"')
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"folder {source} holds no config.json; give a folder saved with save_pretrained"
            )
        return True
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ModelError(f'folder {source} doesn\'t exist; check the path, or use model="demo"')
    return False


def hub_answers() -> bool:
    """Whether the Hugging Face hub can be reached: one request, with a timeout of 5 s.

    The hub's own client retries for half a minute.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_HUB_TIMEOUT_SEC):
            return True
    except urllib.error.HTTPError:
        return True  # an error status is an answer too
    except OSError as error:
        log.debug("the hub doesn't answer: %s", error)
        return False


def _explain(name: str, options: dict[str, Any], error: Exception) -> str:
    if options.get("local_files_only"):
        return (
            f"model {name!r} is not in the local cache and {constants.ENDPOINT} can't be reached; "
            'connect to the network, give a local folder, or use model="demo"'
        )
    if "backend tokenizer" in str(error):
        return _NO_TOKENIZER.format(name)
    reason = " ".join(str(error).split())[:300]
    if "trust_remote_code" in str(error):
        reason = "it brings code of its own, which is never run"
    return (
        f"model {name!r} can't be loaded ({reason}); check the name, that it is a causal language "
        'model of transformers in safetensors format, or use model="demo"'
    )
