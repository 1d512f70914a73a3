"""Inspection: every parameter is counted once, in its place."""

import pytest
import transformers

from shortcut.checkpoint.checkpoint import read_checkpoint
from shortcut.family.fields import UNSOLVED, refusal
from shortcut.surgery.inspection import PARTS, inspect_checkpoint


@pytest.fixture(params=["llama", "gpt2"])
def both(request, checkpoint_of):
    """An inspection and the model that transformers loads from the same folder."""
    folder = checkpoint_of(request.param, sharded=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32", local_files_only=True)
    return inspect_checkpoint(read_checkpoint(folder)), model


def test_the_parts_add_up(both):
    """Blocks, embeddings and the rest hold together what transformers counts, in parameters and in bytes."""
    inspection, model = both
    amounts = [*(block.total for block in inspection.blocks), inspection.embeddings, inspection.rest]
    expected = model.num_parameters()
    assert sum(amount.parameters for amount in amounts) == inspection.total.parameters == expected
    assert sum(amount.bytes for amount in amounts) == inspection.total.bytes == 4 * expected


def test_every_block_is_counted(both):
    """Each block holds what the module of that number holds, all of it in a part that has a name."""
    inspection, model = both
    modules = model.get_decoder().layers if hasattr(model.get_decoder(), "layers") else model.transformer.h
    assert [block.number for block in inspection.blocks] == list(range(len(modules)))
    for block, module in zip(inspection.blocks, modules, strict=True):
        assert block.total.parameters == sum(parameter.numel() for parameter in module.parameters())
        assert sorted(block.parts) == sorted(set(PARTS) - {"other", "cross"})


def test_the_parts_of_a_block(llama):
    """Attention, MLP and norms hold the matrices that the sizes of the config make."""
    parts = inspect_checkpoint(read_checkpoint(llama)).blocks[3].parts
    width, inner, heads, groups = 40, 53, 4, 2
    assert parts["attention"].parameters == 2 * width * width + 2 * width * (width // heads) * groups
    assert parts["mlp"].parameters == 3 * width * inner
    assert parts["norms"].parameters == 2 * width


def test_what_is_outside_the_blocks(both):
    """Embeddings are the vocabulary on both ends, and positions; the rest is the final norm."""
    inspection, model = both
    ends = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    positions = model.transformer.wpe.weight.numel() if hasattr(model, "transformer") else 0
    assert inspection.embeddings.parameters == sum(weight.numel() for weight in ends) + positions
    norm = model.transformer.ln_f if hasattr(model, "transformer") else model.model.norm
    assert inspection.rest.parameters == sum(parameter.numel() for parameter in norm.parameters())


def test_how_an_inspection_prints(llama):
    """Blocks that are alike share a row, which says what one of them holds."""
    inspection = inspect_checkpoint(read_checkpoint(llama, "org/model"))
    lines = str(inspection).splitlines()
    assert lines[:2] == ["org/model", "llama: 7 blocks, 99.76k parameters, 399 KB of F32 in 1 file(s)"]
    assert lines[3].split() == ["blocks", "kind", "attention", "mlp", "norms", "other", "each", "bytes", "of", "model"]
    assert [line.split()[0] for line in lines[4:5]] == ["0-6"]
    moves = [line.split()[:2] for line in lines[-6:-2]]
    assert moves == [["0-6", action] for action in ("drop", "attention-only", "mlp-only", "last-token")]


def test_blocks_of_several_kinds(checkpoint_of):
    """Where the config names kinds of blocks, each block has its own and each kind its row."""
    inspection = inspect_checkpoint(read_checkpoint(checkpoint_of("gemma3_text")))
    kinds = [block.kind for block in inspection.blocks]
    assert kinds == ["sliding_attention", "sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
    assert "\n0-1,3-4,6  sliding_attention" in str(inspection)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "diffllama"}, "diffllama: its attention scales depend on the block number"),
        ({"model_type": "x", "text_config": {"model_type": "diffllama"}}, "diffllama: its attention scales depend"),
        (
            {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True},
            "gpt2: scale_attn_by_inverse_layer_idx = True",
        ),
    ],
)
def test_families_that_are_refused(config, reason):
    """A family whose arithmetic depends on the block number is refused with the reason."""
    assert str(refusal(config)).startswith(reason)


def test_families_that_are_not_refused():
    """A family is not refused for a field at the value that changes nothing."""
    assert refusal({"model_type": "llama", **UNSOLVED}) is None
    assert refusal({"model_type": "llama", **dict.fromkeys(UNSOLVED)}) is None


def test_a_refusal_is_seen(llama):
    """The printed inspection of a refused family ends with why."""
    checkpoint = read_checkpoint(llama)
    checkpoint.config["model_type"] = "diffllama"
    inspection = inspect_checkpoint(checkpoint)
    assert inspection.refusal == "diffllama: its attention scales depend on the block number"
    assert str(inspection).splitlines()[-1] == f"refused: {inspection.refusal}"
