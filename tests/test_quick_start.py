"""The quick start leaves nothing behind: what it put aside is there when it is wanted."""

import subprocess
import sys

SCRIPT = """
import gc, sys
from vlm_vqa.quick_start import quick_start
with quick_start():
    import torch
    @torch.compiler.disable
    def twice(x): return 2 * x
    from torch._dynamo.utils import is_compile_supported
    from scipy.optimize import linear_sum_assignment
    assert not gc.isenabled()
assert gc.isenabled() and gc.get_freeze_count() > 100_000, "the last collection would take a second"
assert not [name for name in sys.modules if name.startswith("torch._dynamo")]
assert "scipy.optimize" not in sys.modules and twice(2) == 4
assert linear_sum_assignment([[1, 0], [0, 1]])[1].tolist() == [1, 0]
assert is_compile_supported("cpu") in (True, False)
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2
with quick_start():
    assert hasattr(sys.modules["torch._dynamo"], "eval_frame"), "what is there already stays"
assert "torch._dynamo" in sys.modules
"""


def test_the_compiler_is_there_after_a_quick_start():
    done = subprocess.run([sys.executable, "-c", SCRIPT], env={"PYTHONPATH": "src"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
