"""What does β buy? Chapter 4 again and again, each time with another price of a nat.

    J(θ) = E[ α·r(x_0, z) − β·Σ_t KL_t ]                                          (DPOK's objective)

A small β lets the policy go wherever the proxy is high, a large one keeps it at the pretrained
model. Between them the same reward queries buy different pairs of proxy and KL; and gold, which is
never trained on, says where the proxy stops being worth its nats.

RUN `python experiments/sweep.py`: five times chapter 4's minutes. It prints and starts one command
for each β (you can type the same), leaves out those whose run is finished, and refuses a finished
run that was made with other settings. Flags behind a lone -- are passed on to chapter 4:

    python experiments/sweep.py --betas 0 0.01 0.1 --out runs/short -- --rounds 10 --prompts tasks

EXPECT the path KL at β = 0 to be several times that at chapter 4's β, for a little more gold.
WRITES in --out sweep_beta_B/ for each β (run folders as chapter 4's), and the plot sweep.png.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from experiments import tables  # noqa: E402
from support import commands, evaluation, flags  # noqa: E402
from support.figures import Figure  # noqa: E402


@dataclass(frozen=True)
class Config:
    betas: tuple[float, ...] = (0.0, 0.01, 0.03, 0.1, 0.3)  # chapter 4 is run with each of these β
    out: str = "runs"  # folder of all runs, and of sweep.png
    flags: Positional[tuple[str, ...]] = ()  # behind a lone --: for chapter 4


def draw(path, summaries):
    """Proxy and gold against path KL, β beside each point.  summaries: β -> a run's evaluation"""
    figure = Figure(figsize=(7, 3.6), dpi=120, layout="constrained")
    for ax, name in zip(figure.subplots(1, 2), ("reward", "gold")):
        columns = [(s["kl"]["after"], s[name]["after"], s[name]["after_se"])
                   for s in summaries.values()]
        ax.errorbar(*zip(*columns), fmt=".-", lw=1, capsize=3)
        for beta, (kl, value, _) in zip(summaries, columns):
            ax.annotate(f"β = {beta:g}", (kl, value), (4, -10), textcoords="offset points", size=7)
        ax.set(xlabel="path KL, nats", title=summaries[beta][name]["title"])
        ax.set_xscale("symlog", linthresh=1)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.grid(alpha=0.3)
    figure.savefig(path)


def main(argv=None):
    config = flags.parse(Config, __doc__, argv)
    folders = {beta: Path(config.out, f"sweep_beta_{beta:g}") for beta in config.betas}
    wanted = {folder.name: ["04_dpok.py", "--beta", str(beta), *config.flags]
              for beta, folder in folders.items()}
    commands.train_missing(wanted, config.out)
    rows = [{"beta": beta} | tables.gains_of(folder) for beta, folder in folders.items()]
    print(f"\n{evaluation.as_text(rows)}")
    path = Path(config.out, "sweep.png")
    draw(path, {beta: tables.summary_of(folder) for beta, folder in folders.items()})
    print(f"On pictures from fresh noise; kl is the path KL in nats. The plot: {path}")
    return rows


if __name__ == "__main__":
    flags.run(main)
