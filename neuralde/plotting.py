"""Pictures of a Solution. Imports matplotlib when they are drawn, not before."""

from __future__ import annotations

import operator

from .solution import Solution


def _checked(sample: int, batch: int) -> int:
    """The sample, if there is one of that number."""
    try:
        sample = operator.index(sample)
    except TypeError:
        raise TypeError(f"sample must be an integer, got {type(sample).__name__}") from None
    if not 0 <= sample < batch:
        raise ValueError(f"sample must be from 0 to {batch - 1}, got {sample}")
    return sample


def plot_solution(solution: Solution, sample: int = 0, axes=None):
    """Draws where a solver works hard: step size, error ratio and stiffness of one sample along t.

    Args:
        solution: of `solve`.
        sample: which one.
        axes: three matplotlib axes to draw on; None makes a figure.

    Returns:
        The axes.

    Raises:
        ValueError: no such sample, or not three axes.
    """
    sample = _checked(sample, len(solution.status))
    if axes is None:
        import matplotlib.pyplot as plt

        _, axes = plt.subplots(3, 1, sharex=True, figsize=(6, 6), layout="constrained")
    if len(axes) != 3:
        raise ValueError(f"axes must be three matplotlib axes, got {len(axes)}")
    steps = solution.steps
    taken = steps.mask[:, sample]

    def column(figure):
        return None if figure is None else figure.detach()[taken, sample].cpu().double().numpy()

    t, dt = column(steps.t), column(steps.dt)
    panels = (
        (abs(dt), "step size |dt|", True),
        (column(steps.error), "error / tolerance", True),
        (column(steps.stiffness), "stiffness, about |λ|", False),
    )
    for axis, (values, label, log) in zip(axes, panels, strict=True):
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        if values is None:
            axis.text(0.5, 0.5, f"{solution.solver.name} has no such estimate", transform=axis.transAxes, ha="center")
            continue
        axis.plot(t, values, marker=".", drawstyle="steps-post" if values is panels[0][0] else "default")
        if log and (values > 0).all():
            axis.set_yscale("log")
    if solution.steps.error is not None:
        axes[1].axhline(1.0, linestyle="--", linewidth=0.8, color="grey")
    axes[2].set_xlabel("t")
    rejected = int(solution.stats.rejected[sample])
    axes[0].set_title(
        f"{solution.solver.name}, sample {sample}: {int(taken.sum())} steps, {rejected} rejected, "
        f"NFE {int(solution.stats.nfe[sample])}"
    )
    return axes


def plot_descent(solution: Solution, sample: int = 0, axes=None):
    """Draws the residual of one sample against depth, on the way to its steady state.

    Args:
        solution: of `solve` for a `SteadyState`.
        sample: which one.
        axes: matplotlib axes to draw on; None makes a figure.

    Returns:
        The axes.

    Raises:
        ValueError: no such sample.
    """
    sample = _checked(sample, len(solution.status))
    if axes is None:
        import matplotlib.pyplot as plt

        _, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    steps, first = solution.steps, solution._problem.rest.first.expand(len(solution.status))
    residuals = [float(first[sample]), *steps.residual[steps.mask[:, sample], sample].tolist()]
    axes.semilogy(range(len(residuals)), residuals, marker=".", label=f"{solution.solver.name}, sample {sample}")
    axes.axhline(solution.termination.tolerance, linestyle="--", linewidth=0.8, color="grey")
    axes.set_xlabel("depth (accepted steps)")
    axes.set_ylabel("residual")
    axes.grid(alpha=0.3)
    status = "converged" if bool(solution.converged[sample]) else "did not converge"
    axes.set_title(
        f"{solution.solver.name}, sample {sample}: {status} in {len(residuals) - 1} steps, "
        f"NFE {int(solution.stats.nfe[sample])}"
    )
    return axes
