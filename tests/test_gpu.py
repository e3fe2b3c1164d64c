"""For the first person who has a GPU: kernels, bf16, NCCL and the whole way, in ten minutes at most."""

from pathlib import Path

import pytest
import torch
from processes import TINY, rows, zeroray

from conf.schema import Model
from trainer.attention import Documents, formula, varlen
from trainer.decoder import Decoder
from trainer.initial import initialize

pytestmark = pytest.mark.gpu


def test_varlen_kernel_follows_the_formula() -> None:
    torch.manual_seed(0)
    bounds = torch.tensor([0, 100, 101, 128, 256], dtype=torch.int32, device="cuda")
    q, k, v = (torch.randn(2, 128, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2))
    documents = Documents(2, 128, bounds)
    expected = formula(q.float(), k.float(), v.float(), documents)
    found = varlen(q, k, v, documents).float()
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


def test_decoder_gives_the_cpu_loss() -> None:
    model = Decoder(Model(), 512)
    initialize(model, 0)
    ids = torch.randint(0, 512, (2, 65), generator=torch.Generator().manual_seed(0))
    on_cpu = model(ids[:, :-1], labels=ids[:, 1:])
    on_gpu = model.cuda()(ids[:, :-1].cuda(), labels=ids[:, 1:].cuda())
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("stage", [1, 3])
def test_the_whole_way_in_bf16_and_again_after_a_stop(tmp_path: Path, stage: int) -> None:
    corpus = tmp_path / "text"
    corpus.mkdir()
    for number in range(60):
        (corpus / f"{number}.txt").write_text(Path(__file__).read_text() * (1 + number % 3) + str(number))
    ranks = torch.cuda.device_count()
    shape = ["train.precision=bf16", f"cluster.ranks={ranks}", f"zero.stage={stage}"]
    args = ["run", *TINY, f"corpus.path={corpus}", *shape]
    first = zeroray(tmp_path, *args, "stages=[prepare,train]")
    assert first.returncode == 0, first.stdout + first.stderr
    losses = [float(str(r["train/loss"])) for r in rows(tmp_path / "runs" / "quickstart")]
    assert losses[-1] < losses[0] - 0.5
    rest = zeroray(tmp_path, *args)
    assert rest.returncode == 0, rest.stdout + rest.stderr
    assert (tmp_path / "runs" / "quickstart" / "export" / "model.safetensors").exists()
