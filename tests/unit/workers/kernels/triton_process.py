"""Runs the Triton kernels where there is no GPU: `interpret` against the oracle, or `compile` for an H100.

    TRITON_INTERPRET=1 python -m tests.unit.workers.kernels.triton_process interpret

A process of its own, because Triton reads that variable when it is imported.
"""

from __future__ import annotations

import sys

import torch

from tests.unit.workers.kernels.paged_cases import CASES, one_by_one
from workers.kernels import triton_paged


def interpret() -> None:
    for case in CASES:
        got = case.run(triton_paged.attend_paged)
        assert got.dtype == case.dtype
        error = float((got.float() - one_by_one(case)).abs().max())
        assert error < (1e-5 if case.dtype == torch.float32 else 2e-3), (case, error)
        print(case, error)


def compile_for_sm_90() -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    for kind, width, group in (("bf16", 128, 4), ("fp16", 64, 8), ("fp32", 80, 1)):
        constants = triton_paged.constants(group, width, 16)
        names = triton_paged.paged_kernel.arg_names
        types = {"q": f"*{kind}", "slots": f"*{kind}", "out": f"*{kind}", "block_table": "*i64", "lengths": "*i64"}
        types["scale"] = "fp32"
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
        source = ASTSource(fn=triton_paged.paged_kernel, signature=signature, constexprs=constants)
        compiled = compile(source, target=GPUTarget("cuda", 90, 32))
        assert len(compiled.asm["cubin"]) > 1000
        shared = compiled.metadata.shared
        assert shared <= 227 * 1024, "an H100's shared memory"
        print(kind, width, group, f"{shared} bytes of shared memory")


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile_for_sm_90}[sys.argv[1]]()
