"""A live model: loading it so that nothing is silently random, finding its blocks, standing in for their forward."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from shortcut.anatomy import find_anatomy
from shortcut.errors import ShortcutError
from shortcut.modeling.hollowing import has_own_code

Model = Any  # a PreTrainedModel of transformers, which mypy does not follow
# What code of transformers raises for a config, a checkpoint or a call that is not right.
LOADING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    RuntimeError,
    ImportError,
    StrictDataclassError,
)
DTYPES = ("auto", "float32", "bfloat16", "float16")


def pick_device(device: str) -> torch.device:
    """The device of this name; "auto" is a GPU, else the CPU. Raises ShortcutError for one not there.

    Of several processes on one machine, each takes its own GPU.
    """
    if device == "auto":
        own = int(os.environ.get("LOCAL_RANK", "0"))  # set by torchrun
        return torch.device("cuda", own) if torch.cuda.is_available() else torch.device("cpu")
    try:
        picked = torch.device(device)
        torch.empty(0, device=picked)
    except (RuntimeError, AssertionError):
        here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ShortcutError(f"no device {device!r} on this machine: there are {', '.join(here)}") from None
    return picked


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    """The type a name means; "auto" is float32 on a CPU and the checkpoint's own type elsewhere."""
    if dtype not in DTYPES:
        raise ShortcutError(f"unknown dtype {dtype!r}: there are {', '.join(DTYPES)}")
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    return getattr(torch, dtype)


def load_model(
    folder: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    places: Mapping[str, Any] | Literal["auto"] | None = None,
    scratch: Path | None = None,
) -> Model:
    """Load a checkpoint with plain `from_pretrained`, in evaluation mode, on one device.

    places: where its parts go instead, "disk" being where they are, and "auto" spreading them over all GPUs; scratch: a
    folder for those that have to be converted. Raises ShortcutError where any weight is missing, unexpected or of
    another shape: transformers itself only logs that, and goes on with random numbers.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    where, trust_remote_code = pick_device(device), trusts(folder, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {"dtype": pick_dtype(dtype, where), "trust_remote_code": trust_remote_code}
    options |= {"device_map": places or {"": where}, "offload_folder": scratch}
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
        model, info = auto_class(config).from_pretrained(
            folder, local_files_only=True, output_loading_info=True, **options
        )
    except LOADING_ERRORS as error:
        raise ShortcutError(f"transformers cannot load {folder}: {' '.join(str(error).split())[:300]}") from None
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if wrong := sorted(map(str, info.get(kind) or ())):
            raise ShortcutError(
                f"{folder} does not load whole: {len(wrong)} {kind.replace('_', ' ')}, such as {wrong[0]}"
            )
    model.eval()
    if getattr(model, "hf_quantizer", None) is not None:  # compressed-tensors unpacks when the whole model is called
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    return model


def trusts(folder: Path, *, trust_remote_code: bool) -> bool:
    """Whether code of a checkpoint may run: when the user says so, and when it is no other than shortcut writes."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return trust_remote_code  # whoever reads it says what is wrong
    return trust_remote_code or (isinstance(config, dict) and has_own_code(folder, config))


def load_config(content: Mapping[str, Any], code: Path | None = None) -> Any:
    """Have transformers read the content of a config.json, just as it would read the file.

    code: a folder with the Python files that its auto_map names, which are run. Raises ShortcutError where transformers
    cannot read it.
    """
    with _config_folder(content, code) as folder:
        return _read_config(folder, code)


def build_empty(content: Mapping[str, Any], code: Path | None = None) -> Model:
    """Build the model of a config.json on the meta device: every module, no memory for weights. As `load_config`."""
    import transformers

    with _config_folder(content, code) as folder:  # code of its own is looked for there once more
        config = _read_config(folder, code)
        named = getattr(transformers, (config.architectures or ["none"])[0], None)
        try:
            with torch.device("meta"):
                if code is None and named is not None:
                    return named._from_config(config)
                return auto_class(config).from_config(config, trust_remote_code=code is not None)
        except LOADING_ERRORS as error:
            reason = " ".join(str(error).split())[:300]
            raise ShortcutError(f"transformers cannot build this config: {reason}") from None


@contextmanager
def _config_folder(content: Mapping[str, Any], code: Path | None) -> Iterator[Path]:
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(content), encoding="utf-8")
        for path in code.glob("*.py") if code else ():
            shutil.copyfile(path, Path(folder) / path.name)
        yield Path(folder)


def _read_config(folder: Path, code: Path | None) -> Any:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=code is not None)
    except LOADING_ERRORS as error:
        reason = " ".join(str(error).split())[:300]
        raise ShortcutError(f"transformers cannot read this config: {reason}") from None


def auto_class(config: Any) -> Any:
    """The class that loads a checkpoint of this config: what its architecture sees, or else what its family may see."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as WRITING
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as SEEING

    named, family = getattr(config, "auto_map", None) or {}, config.model_type
    architecture = (config.architectures or [None])[0]
    by_name = architecture == SEEING.get(family) != WRITING.get(family)
    seeing = "AutoModelForImageTextToText" in named or by_name or (family in SEEING and family not in WRITING)
    return AutoModelForImageTextToText if seeing else AutoModelForCausalLM


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint. Raises ShortcutError where the folder has none that transformers reads."""
    from transformers import AutoTokenizer

    trust_remote_code = trusts(folder, trust_remote_code=trust_remote_code)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except LOADING_ERRORS as error:
        raise ShortcutError(f"no usable tokenizer in {folder}: {' '.join(str(error).split())[:200]}") from None


def load_processor(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """What makes inputs of images and text for a checkpoint. Raises ShortcutError where the folder has none."""
    from transformers import AutoProcessor

    trust_remote_code = trusts(folder, trust_remote_code=trust_remote_code)
    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except LOADING_ERRORS as error:
        raise ShortcutError(f"no usable processor in {folder}: {' '.join(str(error).split())[:200]}") from None
    if not hasattr(processor, "tokenizer"):
        raise ShortcutError(f"the processor in {folder} reads text alone, not images")
    return processor


def find_blocks(model: Model) -> nn.ModuleList:
    """The list of decoder blocks of a live transformers model, in order. Raises ShortcutError as `blocks_path` does."""
    return model.get_submodule(blocks_path(model))


def device_of(model: Model) -> torch.device:
    """Where token ids go in; weights that are on the disk do not count."""
    return next(weight.device for weight in model.parameters() if not weight.is_meta)


def blocks_path(model: Model) -> str:
    """The name of the list of decoder blocks inside a live transformers model.

    Raises ShortcutError, as `find_anatomy` does, where they cannot be told.
    """
    anatomy = find_anatomy((name for name, _ in model.named_parameters()), model.config.to_dict())
    return anatomy.container.removesuffix(".")


def find_decoder(model: Model) -> nn.Module:
    """The part of the model that turns token ids into hidden states: all but the vocabulary projection."""
    decoder, blocks = model.get_decoder(), find_blocks(model)
    holds_blocks = decoder is not None and any(module is blocks for module in decoder.modules())
    return decoder if holds_blocks else model.base_model


def decode(model: Model, inputs: Mapping[str, Any]) -> Any:
    """Run the decoder without a cache; where images are among the inputs, with the towers that see them."""
    decoder = model.base_model if set(inputs) - {"input_ids", "attention_mask"} else find_decoder(model)
    return decoder(**inputs, use_cache=False)


@contextmanager
def forwards_replaced(replacements: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Give modules another forward for the length of a `with` block; they get back exactly what they had."""
    with ExitStack() as stack:
        for module, forward in replacements.items():
            if "forward" in vars(module):  # an earlier stand-in, or accelerate's own
                stack.callback(setattr, module, "forward", module.forward)
            else:
                stack.callback(delattr, module, "forward")
            module.forward = forward
        yield


def hidden_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among the arguments of a block."""
    return args[0] if args else kwargs["hidden_states"]


def hidden_output(output: Any) -> Tensor:
    """The hidden states in what a block returns: a tensor, or a row of values that starts with it."""
    return output[0] if isinstance(output, tuple | list) else output


def call_block(block: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The states after a block that is called as it was before, but for the states that go in."""
    if args:
        return hidden_output(block(hidden, *args[1:], **kwargs))
    return hidden_output(block(**{**kwargs, "hidden_states": hidden}))


def output_forms(model: Model, ids: Tensor | None = None) -> tuple[list[Callable[[Tensor], Any]], Tensor]:
    """For every block, how it wraps the hidden states it returns; and the logits of the pass that showed it.

    ids: what that pass is over, (1, tokens); a single token where none are given.
    """
    forms: dict[nn.Module, Callable[[Tensor], Any]] = {}

    def learn(block: nn.Module, _: Any, output: Any) -> None:
        extra = len(output) - 1 if isinstance(output, tuple | list) else None
        forms[block] = lambda hidden: hidden if extra is None else (hidden, *[None] * extra)

    blocks = find_blocks(model)
    ids = torch.zeros(1, 1, dtype=torch.long, device=device_of(model)) if ids is None else ids
    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_hook(learn).remove)
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
    return [forms[block] for block in blocks], logits
