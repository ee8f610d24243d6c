"""Run by CI on the installed wheel, in a folder of its own: the package works without its source."""

import copy
import importlib.util
import subprocess
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

# The emulator: thread i of a block adds i to y[i]; one thread too many is found.
module = sparse24.ptx.load("""
.version 8.5
.target sm_80
.address_size 64
.visible .entry add_index(.param .u64 y)
{
  .reg .b32 %r<3>;
  .reg .b64 %rd<4>;
  ld.param.u64 %rd1, [y];
  mov.u32 %r1, %tid.x;
  mul.wide.u32 %rd2, %r1, 4;
  add.s64 %rd3, %rd1, %rd2;
  ld.global.u32 %r2, [%rd3];
  add.u32 %r2, %r2, %r1;
  st.global.u32 [%rd3], %r2;
  ret;
}
""")
y = torch.full((64,), 100, dtype=torch.int32)
module.launch("add_index", 1, 64, [y]).raise_for_errors()
assert torch.equal(y, 100 + torch.arange(64, dtype=torch.int32))
assert {error.kind for error in module.launch("add_index", 1, 65, [y]).errors} == {"out_of_bounds"}
command = subprocess.run([sys.executable, "-m", "sparse24", "ptx", "--help"], capture_output=True, text=True)
if importlib.util.find_spec("typer"):
    assert command.returncode == 0 and "check" in command.stdout
else:
    assert command.returncode == 1 and command.stderr.count("\n") == 1 and "sparse24[cli]" in command.stderr
print(f"the wheel works: sparse24 {sparse24.__version__}, torch {torch.__version__}")
