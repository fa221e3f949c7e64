"""Runs the Triton kernels where there is no GPU: `interpret` against the oracle, or `compile` for an H100.

    TRITON_INTERPRET=1 python -m tests.unit.workers.kernels.triton_process interpret

A process of its own, because Triton reads that variable when it is imported.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from tests.unit.workers.kernels import latent_cases
from tests.unit.workers.kernels.paged_cases import CASES, one_by_one
from workers.kernels import triton_latent, triton_paged


def interpret() -> None:
    for case in CASES:
        got = case.run(triton_paged.attend_paged)
        assert got.dtype == case.dtype
        error = float((got.float() - one_by_one(case)).abs().max())
        assert error < (1e-5 if case.dtype == torch.float32 else 2e-3), (case, error)
        print(case, error)
    for latent in latent_cases.CASES:
        got = latent.run(triton_latent.attend_latent_paged)
        assert got.dtype == latent.dtype
        error = float((got.float() - latent.one_by_one()).abs().max())
        assert error < (1e-5 if latent.dtype == torch.float32 else 2e-3), (latent, error)
        print(latent, error)


def compile_for_sm_90() -> None:
    for kind, width, group in (("bf16", 128, 4), ("fp16", 64, 8), ("fp32", 80, 1)):
        constants = triton_paged.constants(group, width, 16)
        types = {"q": f"*{kind}", "slots": f"*{kind}", "out": f"*{kind}", "block_table": "*i64", "lengths": "*i64"}
        _compile(triton_paged.paged_kernel, types | {"scale": "fp32"}, constants, f"{kind} {width} {group}")
    fp32 = dict.fromkeys(("sums", "peaks", "totals"), "*fp32")
    for kind, rank, rope in (("bf16", 512, 64), ("fp16", 256, 64), ("fp32", 128, 32)):
        constants = triton_latent.constants(rank, rope, 16)
        types = fp32 | {"q": f"*{kind}", "slots": f"*{kind}", "block_table": "*i64", "lengths": "*i64", "scale": "fp32"}
        _compile(triton_latent.latent_kernel, types, constants, f"{kind} {rank} {rope}")
        constants = {name: constants[name] for name in ("RANK", "PARTS")}
        _compile(triton_latent.combine_kernel, fp32 | {"out": f"*{kind}"}, constants, f"{kind} {rank}")


def _compile(kernel: Any, types: dict[str, str], constants: dict[str, int], title: str) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = compile(source, target=GPUTarget("cuda", 90, 32))
    assert len(compiled.asm["cubin"]) > 1000
    shared = compiled.metadata.shared
    assert shared <= 227 * 1024, "an H100's shared memory"
    print(kernel.__name__, title, f"{shared} bytes of shared memory")


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile_for_sm_90}[sys.argv[1]]()
