"""Converted models under torch.compile, and under eight threads at once."""

import copy
import shutil
import threading

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from sparse24.conversion import convert
from sparse24.nn import SparseLinear
from sparse24.pruning import prune
from sparse24.quantization import quantize

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # inductor's import

# Inductor compiles C++ on the CPU. Without a compiler, AOTAutograd alone still traces all the way to the operators.
BACKEND = "inductor" if shutil.which("g++") or shutil.which("clang++") else "aot_eager"


def mlp(int8: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(19, 40), nn.ReLU(), nn.Linear(40, 7)).eval()
    prune(model)
    convert(model)
    if int8:
        quantize(model)
    return model


def cnn(weights: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(16, 12, 1)).eval()
    prune(model, "pair 4:8" if "int4" in weights else "2:4")
    if weights != "float32":
        quantize(model, torch.int4 if "int4" in weights else torch.int8, weight_only="only" in weights)
    convert(model)
    return model


def samples(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Recorder:
    """A backend that keeps the operators of the graphs it is given and runs them as they are."""

    def __init__(self) -> None:
        self.graphs: list[list[str]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]):
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]):
            self.graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
            return make_boxed_func(graph.forward)

        return aot_autograd(fw_compiler=keep)(graph, inputs)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("int8", [False, True], ids=["f32", "i8"])
def test_one_graph_for_every_batch(int8: bool) -> None:
    """fullgraph, no graph break; with a dynamic batch one compilation serves all sizes."""
    model = mlp(int8)
    counter = CompileCounterWithBackend(BACKEND)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for batch in (2, 5, 64):
            x = samples(batch, 3, 19)
            assert torch.equal(compiled(x), model(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("form", ["packed", "unpacked"])
@pytest.mark.parametrize("weight_dtype", [None, torch.int8], ids=["f32", "i8"])
def test_a_single_layer_is_equal_to_eager_in_either_form(form: str, weight_dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    layer = SparseLinear(19, 7, weight_dtype=weight_dtype)
    layer = layer.pack() if form == "packed" else layer
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, x2 = samples(5, 19).requires_grad_(), samples(5, 19).requires_grad_()
    y, y2 = compiled(x), layer(x2)
    assert torch.equal(y, y2)
    trained = [p for p in layer.parameters() if p.requires_grad]
    grads = torch.autograd.grad(y.square().sum(), [x, *trained])
    for left, right in zip(grads, torch.autograd.grad(y2.square().sum(), [x2, *trained]), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weights", ["float32", "int8", "int4", "int8 only", "int4 only"])
def test_one_graph_for_every_batch_of_images(weights: str) -> None:
    model = cnn(weights)
    counter = CompileCounterWithBackend(BACKEND)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for batch in (2, 5):
            x = samples(batch, 8, 9, 7)
            assert torch.equal(compiled(x), model(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.int8, torch.int4], ids=str)
def test_weights_alone_in_a_graph(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 8))
    prune(model, "pair 4:8" if dtype is torch.int4 else "2:4")
    quantize(model, dtype, weight_only=True)
    convert(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, x2 = samples(5, 24).requires_grad_(), samples(5, 24).requires_grad_()
    y, y2 = compiled(x), model(x2)
    assert torch.equal(y, y2)
    y.square().sum().backward()
    y2.square().sum().backward()
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-6, atol=1e-6)


def test_autocast_inside_a_graph() -> None:
    model = mlp()

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x)

    x = samples(5, 19)
    with torch.no_grad():
        y = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
        assert y.dtype is torch.bfloat16 and torch.equal(y, run(x))


def test_errors_of_shape_come_while_tracing() -> None:
    with pytest.raises(Exception, match=r"x must be \[\.\.\., 19\] to match weight \[40, 19\]; got \[5, 18\]"):
        torch.compile(mlp(), fullgraph=True, backend="aot_eager")(samples(5, 18))


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_compiled_transformer_multiplies_sparse_and_reads_no_weight(grad: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 36, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    prune(model)
    convert(model)
    recorder = Recorder()
    x = samples(3, 5, 16)
    with torch.set_grad_enabled(grad):
        y = torch.compile(model, fullgraph=True, backend=recorder)(x)
        torch.testing.assert_close(y, model(x), rtol=0, atol=2e-6)
    (graph,) = recorder.graphs[:1]
    ours = [target for target in graph if target.startswith("sparse24")]
    assert len(ours) == 4 and all("linear" in target for target in ours), ours
    assert not any("transformer_encoder_layer_fwd" in target for target in graph)


def test_weight_in_a_graph_is_the_dense_weight() -> None:
    layer = SparseLinear(19, 7).pack()

    def run(x: Tensor) -> Tensor:
        return layer(x.to(layer.weight.dtype)) + (layer.weight * x).sum(1) + layer.weight.shape[0]

    x = samples(19)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x))


def test_fake_quantised_training_compiles() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))
    prune(model)
    quantize(model)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    x = samples(8, 16)
    model(x).square().sum().backward()
    compiled(x).square().sum().backward()
    for left, right in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("int8", [False, True], ids=["f32", "i8"])
def test_eight_threads_share_one_model(int8: bool) -> None:
    model = mlp(int8)
    inputs = [samples(batch, 19, seed=batch) for batch in range(1, 9)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    start, failures = threading.Barrier(8), []

    def work(i: int) -> None:
        try:
            start.wait()
            for n in range(50):
                if n % 2:
                    with torch.no_grad():
                        y = model(inputs[i])
                else:
                    x = inputs[i].clone().requires_grad_()
                    y = model(x)
                    y.sum().backward()
                    assert x.grad is not None and x.grad.isfinite().all()
                assert torch.equal(y, expected[i])
                assert model[0].weight.shape == (40, 19) and len(model.state_dict()) >= 6
        except BaseException as error:  # an assertion in a thread would pass unseen
            failures.append(error)

    for parameter in model.parameters():
        parameter.requires_grad_(False)  # .grad is shared by the threads; the gradient of x is not
    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
