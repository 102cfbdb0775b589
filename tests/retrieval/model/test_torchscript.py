"""Reading TorchScript archives for their tensors alone."""

from __future__ import annotations

import pickle
import shutil
import zipfile

import clip_cases as cases
import pytest
import torch
from torch import nn

from retrieval.model.checkpoints import ModelError, read_clip, read_tensors
from retrieval.model.loading import load
from retrieval.model.torchscript import is_torchscript, read_torchscript


class Network(nn.Module):
    """With what archives hold besides parameters: buffers, views, shared and half tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.halves = nn.Parameter(torch.randn(2, 3).half())
        self.rows = nn.Parameter(torch.randn(4, 6)[1:, ::2].T)
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("none", torch.zeros(0))
        self.sizes = [1, 2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * float(self.sizes[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*torch.jit.*")
@pytest.mark.parametrize("how", ["trace", "script"])
def test_tensors_are_those_of_the_program(how, tmp_path):
    network = Network().eval()
    make = torch.jit.script
    if how == "trace":
        make = lambda module: torch.jit.trace(module, torch.randn(2, 3))  # noqa: E731
    make(network).save(str(tmp_path / "w.pt"))
    assert is_torchscript(tmp_path / "w.pt")
    got = read_torchscript(tmp_path / "w.pt")
    expected = network.state_dict()
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key].dtype == value.dtype
        assert torch.equal(got[key], value), key


class Holder(nn.Module):
    """A module tree with the names of a state dict, as OpenAI saved theirs."""

    def __init__(self, state: dict) -> None:
        super().__init__()
        below: dict[str, dict] = {}
        for key, value in state.items():
            name, _, rest = key.partition(".")
            if rest:
                below.setdefault(name, {})[rest] = value
            else:
                self.register_buffer(name, value)
        for name, part in below.items():
            self.add_module(name, Holder(part))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*torch.jit.*")
def test_an_archive_of_openai_is_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("ENN_ARCHITECTURES", str(tmp_path))
    cases.write_architecture(tmp_path / "tiny-77.json", cases.tiny(77))
    cases.write_architecture(tmp_path / "tiny-gelu.json", cases.tiny(77, quick_gelu=False))
    state = cases.plain_state(cases.network(cases.tiny(77)))
    given = {key: v.half() if v.ndim > 1 else v for key, v in cases.openai(state).items()}
    torch.jit.trace(Holder(given), torch.ones(1)).save(str(tmp_path / "ViT-T.pt"))
    assert read_clip(tmp_path / "ViT-T.pt").layout == "openai"
    model = load("tiny-77", checkpoint=tmp_path / "ViT-T.pt")
    plain = cases.save(given, tmp_path / "same.safetensors")
    assert model.weights_hash == load("tiny-77", checkpoint=plain).weights_hash
    with pytest.raises(ModelError, match="trained with QuickGELU"):
        load("tiny-gelu", checkpoint=tmp_path / "ViT-T.pt")


class Payload:
    def __reduce__(self):
        return (print, ("code in weights was run",))


def archive(path, content: bytes, storage: bytes = b"") -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("w/data.pkl", content)
        file.writestr("w/data/0", storage)
        file.writestr("w/constants.pkl", b"")


# The pickle of a tensor of `size` in storage 0, as torch writes it.
def tensor_pickle(size: int, kind: str = "FloatStorage") -> bytes:
    return (
        b"\x80\x02c__torch__\nA\n)\x81}X\x01\x00\x00\x00pctorch._utils\n_rebuild_tensor_v2\n"
        b"((X\x07\x00\x00\x00storagectorch\n" + kind.encode() + b"\nX\x01\x00\x00\x000"
        b"X\x03\x00\x00\x00cpuK\x02tQK\x00(K" + bytes([size]) + b"t(K\x01t\x89ccollections\n"
        b"OrderedDict\n)RtRsb."
    )


def test_the_hand_made_archive_is_one(tmp_path):
    archive(tmp_path / "w.pt", tensor_pickle(2), torch.ones(2).numpy().tobytes())
    assert read_tensors(tmp_path / "w.pt")["p"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Payload()), "pickled code"),
        (pickle.dumps({"p": 1}), "expected a state_dict"),
        (tensor_pickle(3), "cannot read weights"),  # reaches beyond its storage
        (tensor_pickle(2, "UntypedStorage"), "pickled code"),
        (b"\x80\x02", "cannot read weights"),
        (b"", "cannot read weights"),
    ],
)
def test_archives_that_are_no_weights_are_refused(content, message, tmp_path, capfd):
    archive(tmp_path / "w.pt", content, torch.ones(2).numpy().tobytes())
    with pytest.raises(ModelError, match=message) as caught:
        read_tensors(tmp_path / "w.pt")
    assert "\n" not in str(caught.value)
    assert "code in weights was run" not in capfd.readouterr().out


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*torch.jit.*")
def test_a_cut_archive_is_refused(tmp_path):
    torch.jit.script(Network().eval()).save(str(tmp_path / "w.pt"))
    whole = (tmp_path / "w.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"cannot read weights|damaged"):
        read_tensors(tmp_path / "cut.pt")
    shutil.copy(tmp_path / "w.pt", tmp_path / "less.pt")
    with (
        zipfile.ZipFile(tmp_path / "w.pt") as source,
        zipfile.ZipFile(tmp_path / "less.pt", "w") as target,
    ):
        for name in source.namelist():
            if not name.endswith("/data/0"):
                target.writestr(name, source.read(name))
    with pytest.raises(ModelError, match="cannot read weights"):
        read_tensors(tmp_path / "less.pt")
