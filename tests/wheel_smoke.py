"""Run by CI on the installed wheel, in a folder of its own: the package works without its source."""

import copy
import sys
from pathlib import Path

import torch

import sparse24

assert Path(sparse24.__file__).is_relative_to(sys.prefix), sparse24.__file__
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(70, 50), torch.nn.GELU(), torch.nn.Linear(50, 30)).eval()
sparse24.prune(model)
dense = copy.deepcopy(model)
sparse24.convert(model)
assert isinstance(model[0], sparse24.SparseLinear) and isinstance(model[2], sparse24.SparseLinear)
x = torch.randn(7, 70)
with torch.inference_mode():
    assert torch.allclose(model(x), dense(x), rtol=0, atol=1e-5)
sparse24.save(model, "model.safetensors")
fresh = torch.nn.Sequential(torch.nn.Linear(70, 50), torch.nn.GELU(), torch.nn.Linear(50, 30)).eval()
sparse24.load("model.safetensors", fresh)
with torch.inference_mode():
    assert torch.equal(fresh(x), model(x))
print(f"the wheel works: sparse24 {sparse24.__version__}, torch {torch.__version__}")
