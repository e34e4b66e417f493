"""Safetensors as they lie on disk: mapped without a copy, and refused clearly when they are not whole."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from crosspool.core.errors import (
    CorruptCheckpointError,
    MissingTensorError,
    TensorShapeError,
    UnsupportedModelError,
)
from crosspool.models.checkpoint import INDEX, Checkpoint
from crosspool.models.weight_names import TensorSlot

pytestmark = pytest.mark.backend

A = TensorSlot("a", (3, 4))
B = TensorSlot("b", (5,))


def tensors() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(12.0).view(3, 4), "b": torch.arange(5).bfloat16()}


def single(folder: Path, name: str = "model.safetensors") -> Path:
    save_file(tensors(), folder / name)
    return folder / name


def sharded(folder: Path, **weight_map: object) -> Path:
    save_file({"a": tensors()["a"]}, folder / "one.safetensors")
    save_file({"b": tensors()["b"]}, folder / "two.safetensors")
    files = {"a": "one.safetensors", "b": "two.safetensors", **weight_map}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}), encoding="utf-8")
    return folder / INDEX


def mapped_ranges(file: Path) -> list[range]:
    """Where this process has the file in memory."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    bounds = [line[0].split("-") for line in lines if line[-1] == str(file)]
    return [range(int(first, 16), int(last, 16)) for first, last in bounds]


def test_a_single_file(tmp_path: Path) -> None:
    single(tmp_path)
    checkpoint = Checkpoint(str(tmp_path))
    assert torch.equal(checkpoint.tensor(A, torch.float32), tensors()["a"])
    assert torch.equal(checkpoint.tensor(B, torch.bfloat16), tensors()["b"])


def test_what_is_released_can_still_be_read(tmp_path: Path) -> None:
    sharded(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    view = checkpoint.tensor(A, torch.float32)
    checkpoint.release()
    assert torch.equal(view, tensors()["a"])
    assert torch.equal(checkpoint.tensor(B, torch.bfloat16), tensors()["b"])


def test_any_name_will_do_for_an_only_file_and_the_usual_one_goes_first(tmp_path: Path) -> None:
    single(tmp_path, "weights.safetensors")
    assert torch.equal(Checkpoint(tmp_path).tensor(A, torch.float32), tensors()["a"])
    save_file({"a": torch.zeros(3, 4)}, tmp_path / "model.safetensors")
    assert Checkpoint(tmp_path).tensor(A, torch.float32).count_nonzero() == 0


def test_an_index(tmp_path: Path) -> None:
    sharded(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    assert torch.equal(checkpoint.tensor(A, torch.float32), tensors()["a"])
    assert torch.equal(checkpoint.tensor(B, torch.bfloat16), tensors()["b"])


def test_the_stored_dtype_is_a_view_of_the_mapped_file(tmp_path: Path) -> None:
    file = single(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    tensor = checkpoint.tensor(A, torch.float32)
    assert checkpoint.stored_as(A, torch.float32)
    assert any(tensor.data_ptr() in addresses for addresses in mapped_ranges(file))
    assert tensor.data_ptr() == checkpoint.tensor(A, torch.float32).data_ptr()


def test_another_dtype_is_a_converted_copy(tmp_path: Path) -> None:
    file = single(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    tensor = checkpoint.tensor(A, torch.float16)
    assert tensor.dtype is torch.float16
    assert torch.equal(tensor.float(), tensors()["a"])
    assert not checkpoint.stored_as(A, torch.float16)
    assert not any(tensor.data_ptr() in addresses for addresses in mapped_ranges(file))


def test_a_mapping_outlives_its_checkpoint(tmp_path: Path) -> None:
    file = single(tmp_path)
    tensor = Checkpoint(tmp_path).tensor(A, torch.float32)
    file.unlink()
    assert torch.equal(tensor, tensors()["a"])


def test_writing_to_a_view_does_not_reach_the_file(tmp_path: Path) -> None:
    file = single(tmp_path)
    before = file.read_bytes()
    Checkpoint(tmp_path).tensor(A, torch.float32).zero_()
    assert file.read_bytes() == before


@pytest.mark.parametrize("kept", [0, 5, 8, 30, -1])
def test_a_truncated_file(tmp_path: Path, kept: int) -> None:
    file = single(tmp_path)
    content = file.read_bytes()[:kept]
    file.write_bytes(content)
    with pytest.raises(CorruptCheckpointError) as error:
        Checkpoint(tmp_path)
    assert f"{file} ({len(content):,} bytes) is not a whole safetensors file" in str(error.value)


def test_a_header_whose_offsets_leave_the_file(tmp_path: Path) -> None:
    file = single(tmp_path)
    content = file.read_bytes()
    assert content.count(b'"data_offsets":[0,48]') == 1
    file.write_bytes(content.replace(b'"data_offsets":[0,48]', b'"data_offsets":[0,99]'))
    with pytest.raises(CorruptCheckpointError, match=r"model\.safetensors"):
        Checkpoint(tmp_path)


def test_a_header_length_beyond_the_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(CorruptCheckpointError, match=r"model\.safetensors"):
        Checkpoint(tmp_path)


def test_something_else_under_the_name(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n" * 3)
    with pytest.raises(CorruptCheckpointError, match="is not a whole safetensors file"):
        Checkpoint(tmp_path)


def test_a_missing_tensor(tmp_path: Path) -> None:
    single(tmp_path)
    with pytest.raises(MissingTensorError, match="no tensor nowhere in 2 tensors"):
        Checkpoint(tmp_path).tensor(TensorSlot("nowhere", (1,)), torch.float32)


def test_a_tensor_that_only_the_index_knows(tmp_path: Path) -> None:
    sharded(tmp_path, c="two.safetensors")
    with pytest.raises(MissingTensorError, match=r"two\.safetensors: no tensor c"):
        Checkpoint(tmp_path).tensor(TensorSlot("c", (1,)), torch.float32)


def test_another_shape(tmp_path: Path) -> None:
    single(tmp_path)
    with pytest.raises(TensorShapeError) as error:
        Checkpoint(tmp_path).tensor(TensorSlot("a", (4, 3)), torch.float32)
    assert "model.safetensors: a has shape [3, 4], the config implies [4, 3]" in str(error.value)


def test_a_dtype_that_is_no_weight(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, 4, dtype=torch.int8)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert not checkpoint.stored_as(A, torch.float32)
    with pytest.raises(
        TensorShapeError, match="a is stored as I8, only F32, BF16, F16 are read, and F8_E4M3 of"
    ):
        checkpoint.tensor(A, torch.float32)


def float8(folder: Path, **changes: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix of two blocks by three, of which the last ones are not whole."""
    numbers = torch.randn(130, 260, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    scales = torch.arange(1.0, 7.0).view(2, 3) / 7
    kept = {"a": numbers, "a_scale_inv": scales, **changes}
    save_file({name: it for name, it in kept.items() if it is not None}, folder / "model.safetensors")
    return numbers, scales


EIGHT = TensorSlot("a", (130, 260))


def test_float8_is_a_view_of_numbers_and_float32_scales(tmp_path: Path) -> None:
    numbers, scales = float8(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    found = checkpoint.float8(EIGHT)
    assert checkpoint.is_float8(EIGHT) and not checkpoint.stored_as(EIGHT, torch.bfloat16)
    assert torch.equal(found.numbers.view(torch.uint8), numbers.view(torch.uint8))
    assert torch.equal(found.scales, scales)
    file = tmp_path / "model.safetensors"
    assert any(found.numbers.data_ptr() in addresses for addresses in mapped_ranges(file))
    float8(tmp_path, a_scale_inv=scales.bfloat16())
    coarse = Checkpoint(tmp_path).float8(EIGHT).scales
    assert coarse.dtype is torch.float32 and torch.equal(coarse, scales.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float8_is_dequantised_and_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    numbers, scales = float8(tmp_path)
    wanted = numbers.double()
    for row in range(130):
        for column in range(260):
            wanted[row, column] *= scales[row // 128, column // 128].double()
    found = Checkpoint(tmp_path).tensor(EIGHT, dtype)
    assert found.dtype is dtype
    assert torch.equal(found, wanted.float().to(dtype))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"a_scale_inv": None}, MissingTensorError, "no tensor a_scale_inv in 1 tensors"),
        (
            {"a_scale_inv": torch.ones(3, 3)},
            TensorShapeError,
            r"a_scale_inv has shape \[3, 3\], the config implies \[2, 3\]",
        ),
        ({"a_scale_inv": torch.ones(())}, TensorShapeError, r"a_scale_inv has shape \[\]"),
        (
            {"a_scale_inv": torch.ones(2, 3, dtype=torch.uint8)},
            TensorShapeError,
            "a_scale_inv is stored as U8",
        ),
        ({"a": torch.ones(130, 130).to(torch.float8_e4m3fn)}, TensorShapeError, r"a has shape \[130, 130\]"),
        ({"a": torch.ones(130, 260).to(torch.float8_e5m2)}, TensorShapeError, "a is stored as F8_E5M2"),
    ],
)
def test_float8_that_is_not_whole(tmp_path: Path, changes: Any, error: type, message: str) -> None:
    float8(tmp_path, **changes)
    for read in (Checkpoint.check, Checkpoint.float8, lambda it, slot: it.tensor(slot, torch.float32)):
        with pytest.raises(error, match=message):
            read(Checkpoint(tmp_path), EIGHT)


def test_a_float8_vector_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(TensorShapeError, match="a is stored as F8_E4M3"):
        Checkpoint(tmp_path).tensor(TensorSlot("a", (4,)), torch.float32)


def test_a_shard_that_is_missing(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(CorruptCheckpointError, match=r"two\.safetensors \(missing\)"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("file", ["../other.safetensors", "/etc/passwd", "sub/x.safetensors", "b.bin", 3, ""])
def test_an_index_that_leaves_the_folder(tmp_path: Path, file: object) -> None:
    sharded(tmp_path, b=file)
    with pytest.raises(CorruptCheckpointError, match="b should be in a safetensors file of this folder"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {}}', "nonsense"])
def test_an_index_that_is_none(tmp_path: Path, content: str) -> None:
    sharded(tmp_path).write_text(content, encoding="utf-8")
    with pytest.raises(CorruptCheckpointError, match=INDEX):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf", "consolidated.00.pth"])
def test_other_formats_are_named_and_not_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(
        UnsupportedModelError, match=f"no safetensors, and other formats are not read: {name}"
    ):
        Checkpoint(tmp_path)


def test_folders_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpointError, match="has no safetensors file"):
        Checkpoint(tmp_path)
    with pytest.raises(CorruptCheckpointError, match="is not a folder"):
        Checkpoint(tmp_path / "nowhere")


def test_several_files_need_an_index(tmp_path: Path) -> None:
    single(tmp_path, "one.safetensors")
    single(tmp_path, "two.safetensors")
    with pytest.raises(CorruptCheckpointError, match="2 safetensors files and no"):
        Checkpoint(tmp_path)
