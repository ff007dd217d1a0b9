"""Operators of torch.library, differentiable by way of a formula in PyTorch."""
from collections.abc import Callable

import torch
from torch import Tensor

_lib = torch.library.Library("flashvsr", "FRAGMENT")


def define(op: str, arguments: str, returns: str, run: Callable, fake: Callable) -> None:
    """Makes run the operator flashvsr::op(arguments) -> returns, with fake for tensors without memory."""
    _lib.define(f"{op}({arguments}) -> {returns}")
    _lib.impl(op, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flashvsr::{op}", fake, lib=_lib)


def define_differentiable(op: str, arguments: str, results: int, run: Callable, fake: Callable,
                          formula: Callable) -> None:
    """The same with results tensors, and gradients of all floating arguments, for which formula runs again.

    arguments: tensors first, then numbers; the operator has backend behind them
    formula: the results from arguments without backend
    """
    tensors = arguments.count("Tensor")
    returns = "Tensor" if results == 1 else f"({', '.join(['Tensor'] * results)})"
    define(op, f"{arguments}, str? backend", returns, run, fake)

    def backward(*call):
        return _gradients(formula, call[:results], call[results:])

    def backward_fake(*call):
        return [x.new_empty(x.shape) for x in call[results:] if _floating(x)]

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:tensors])
        ctx.numbers = inputs[tensors:-1]

    def autograd(ctx, *grads):
        call = *ctx.saved_tensors, *ctx.numbers
        gradients = iter(getattr(torch.ops.flashvsr, f"{op}_backward")(*grads, *call))
        return *(next(gradients) if _floating(x) else None for x in call), None
    grads = "".join(f"Tensor grad{i}, " for i in range(results))
    define(f"{op}_backward", grads + arguments, "Tensor[]", backward, backward_fake)
    torch.library.register_autograd(f"flashvsr::{op}", autograd, setup_context=setup_context, lib=_lib)


def _floating(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _gradients(formula: Callable, grads: tuple[Tensor, ...], call: tuple) -> list[Tensor]:
    with torch.enable_grad():
        call = [x.detach().requires_grad_() if _floating(x) else x for x in call]
        results = formula(*call)
        results = results if isinstance(results, tuple) else (results,)
        gradients = torch.autograd.grad(results, [x for x in call if _floating(x)], grads)
    return [gradient.contiguous() for gradient in gradients]
