"""Triton's interpreter, made fit to run the kernels of flash-linear-attention on a CPU.

``interpret`` is called before anything imports Triton. The interpreter runs each program of a
kernel in NumPy: it shows whether what a kernel computes is right, and neither how fast it is nor
whether it compiles.
"""

import ast
import os
import sys
import warnings

import numpy as np


def interpret() -> None:
    """Switch the interpreter on for this process, and mend what the kernels stumble over.

    Written for Triton 3.9.0. Of the configurations that a kernel can be tuned to, the first runs.

    Raises:
        RuntimeError: if Triton was imported before the interpreter was switched on.
    """
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("Triton decides when it is imported whether it interprets")
    os.environ["TRITON_INTERPRET"] = "1"
    np.seterr(over="ignore", invalid="ignore")  # of numbers that a kernel leaves out
    import triton.language as tl
    from triton.runtime import autotuner, interpreter

    # There is no device to time configurations on.
    prune = autotuner.Autotuner.prune_configs
    autotuner.Autotuner.prune_configs = lambda self, kwargs: prune(self, kwargs)[:1]

    # A loop's variable is a tensor to the compiler, as assigned ones are: a kernel may cast it.
    def visit_for(self, node: ast.For) -> ast.For:
        node = self.generic_visit(node)
        if isinstance(node.target, ast.Name):
            text = f"{node.target.id} = interpreter_semantic.to_tensor({node.target.id}, False)"
            node.body.insert(0, ast.parse(text).body[0])
        return node

    interpreter.ASTTransformer.visit_For = visit_for

    # bfloat16 is held as the bits of uint16, which NumPy would multiply as integers.
    builder = interpreter.InterpreterBuilder

    def is_narrow(handle: interpreter.TensorHandle) -> bool:
        return handle.dtype.scalar == tl.bfloat16

    def widen(self, handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
        return self.create_fp_ext(handle, tl.float32) if is_narrow(handle) else handle

    binary_op, unary_op, dot = builder.binary_op, builder.unary_op, builder.create_dot
    add_up, machine = interpreter.ReduceOps.sum, interpreter.interpreter_builder

    def binary_in_float32(self, lhs, rhs, op):
        result = binary_op(self, widen(self, lhs), widen(self, rhs), op)
        narrow = is_narrow(lhs) and result.data.dtype == np.float32  # not of a comparison
        return self.create_fp_trunc(result, tl.bfloat16) if narrow else result

    def unary_in_float32(self, arg, op):
        result = unary_op(self, widen(self, arg), op)
        return self.create_fp_trunc(result, tl.bfloat16) if is_narrow(arg) else result

    def dot_in_float32(self, a, b, d, *options):
        return dot(self, widen(self, a), widen(self, b), d, *options)

    def sum_in_float32(self, values):
        if not is_narrow(values.handle):
            return add_up(self, values)
        wide = builder.create_fp_ext(machine, values.handle, tl.float32)
        total = np.sum(wide.data, axis=self.axis, keepdims=self.keep_dims)
        narrow = interpreter.TensorHandle(np.asarray(total, np.float32), tl.float32)
        return self.to_tensor(
            builder.create_fp_trunc(machine, narrow, tl.bfloat16).data, tl.bfloat16
        )

    builder.binary_op, builder.unary_op = binary_in_float32, unary_in_float32
    builder.create_dot, interpreter.ReduceOps.sum = dot_in_float32, sum_in_float32

    with warnings.catch_warnings():  # that this is no GPU
        warnings.simplefilter("ignore")
        import fla.ops  # noqa: F401
