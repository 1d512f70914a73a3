"""Loading a model with its tokenizer or processor, so that nothing is silently random."""

import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError

from shortcut.checkpoint.checkpoint import read_checkpoint
from shortcut.common.errors import ShortcutError
from shortcut.family.halves import has_own_code
from shortcut.family.tasks import Task, find_task
from shortcut.options.groups import Loading

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
# By what a model reads, under which names its forward takes that.
READ = {
    "text": ("input_ids", "decoder_input_ids"),
    "image": ("pixel_values",),
    "audio": ("input_features", "input_values"),
}
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
    how: Loading = Loading(),  # noqa: B008  (frozen)
    *,
    places: Mapping[str, Any] | Literal["auto"] | None = None,
    scratch: Path | None = None,
) -> Model:
    """Load a checkpoint with plain `from_pretrained`, in evaluation mode, on one device.

    places: where its parts go instead, "disk" being where they are, and "auto" spreading them over all GPUs; scratch: a
    folder for those that have to be converted. Raises ShortcutError where any weight is missing, unexpected or of
    another shape: transformers itself only logs that, and goes on with random numbers. Heads that predict further
    tokens, which it leaves out, are not unexpected.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    where, trust = pick_device(how.device), trusts(folder, trust_remote_code=how.trust_remote_code)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust)
        model, info = auto_class(config).from_pretrained(
            folder,
            dtype=pick_dtype(how.dtype, where),
            device_map=places or {"": where},
            offload_folder=scratch,
            trust_remote_code=trust,
            local_files_only=True,
            output_loading_info=True,
        )
    except LOADING_ERRORS as error:
        raise ShortcutError(f"transformers cannot load {folder}: {' '.join(str(error).split())[:300]}") from None
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        wrong = sorted(map(str, info.get(kind) or ()))
        if wrong := _without_heads(folder, wrong) if kind == "unexpected_keys" else wrong:
            raise ShortcutError(
                f"{folder} does not load whole: {len(wrong)} {kind.replace('_', ' ')}, such as {wrong[0]}"
            )
    model.eval()
    if getattr(model, "hf_quantizer", None) is not None:  # compressed-tensors unpacks when the whole model is called
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device))
    return model


def _without_heads(folder: Path, names: list[str]) -> list[str]:
    """These names of weights, but for heads that predict further tokens, where it can be told which they are."""
    try:
        is_head = read_checkpoint(folder).anatomy.predicts_further if names else bool
    except ShortcutError:
        return names
    return [name for name in names if not is_head(name)]


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
    """The class that loads a checkpoint of this config."""
    import transformers

    return getattr(transformers, _task_of(config, config.architectures).auto)


def task_of(model: Model) -> Task:
    """What a live model is for."""
    return _task_of(model.config, [type(model).__name__])


def _task_of(config: Any, architectures: Sequence[str] | None) -> Task:
    fields = ("model_type", "auto_map", "is_decoder", "is_encoder_decoder")
    return find_task({**{name: getattr(config, name, None) for name in fields}, "architectures": architectures})


def modalities(config: Any) -> frozenset[str]:
    """What a model of this config reads: "text", "image", "audio". Code of its own is taken to read text."""
    import transformers

    named = getattr(transformers, (config.architectures or ["none"])[0], None)
    taken = signature(named.forward).parameters if named is not None else ("input_ids",)
    return frozenset(kind for kind, names in READ.items() if any(name in taken for name in names))


def start_token(folder: Path, config: Any) -> int | None:
    """The token that the decoder behind an encoder starts with; None for other models."""
    import transformers

    if not config.is_encoder_decoder:
        return None
    try:
        said = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    except LOADING_ERRORS:
        said = transformers.GenerationConfig.from_model_config(config)
    tokens = (getattr(said, name, None) for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"))
    return next((token for token in tokens if isinstance(token, int)), 0)


def load_reader(folder: Path, reads: Collection[str], *, trust_remote_code: bool = False) -> Any:
    """What makes inputs of what a model reads, as `modalities` says it.

    Raises ShortcutError where the folder has no such thing.
    """
    import transformers

    alone = {"text": "AutoTokenizer", "image": "AutoImageProcessor", "audio": "AutoFeatureExtractor"}
    kind = alone[next(iter(reads))] if len(reads) == 1 else "AutoProcessor"
    trust_remote_code = trusts(folder, trust_remote_code=trust_remote_code)
    try:
        reader = getattr(transformers, kind)
        return reader.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except LOADING_ERRORS as error:
        raise ShortcutError(f"no usable processor in {folder}: {' '.join(str(error).split())[:200]}") from None


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint. Raises ShortcutError where the folder has none that transformers reads."""
    from transformers import AutoTokenizer

    trust_remote_code = trusts(folder, trust_remote_code=trust_remote_code)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except StrictDataclassError as error:  # it reads the config first
        raise ShortcutError(f"transformers cannot read this config: {' '.join(str(error).split())[:300]}") from None
    except LOADING_ERRORS as error:
        raise ShortcutError(f"no usable tokenizer in {folder}: {' '.join(str(error).split())[:200]}") from None


def load_processor(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """What makes inputs of images and text for a checkpoint. Raises ShortcutError where the folder has none."""
    processor = load_reader(folder, ("image", "text"), trust_remote_code=trust_remote_code)
    if not hasattr(processor, "tokenizer"):
        raise ShortcutError(f"the processor in {folder} reads text alone, not images")
    return processor
