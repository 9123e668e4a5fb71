"""Whether a difference of two models is more than chance: errors, interval, p-value, verdict.

Seeds are the unit: what one training gave says little of the next one. The values of S trainings
on the same P prompts with K pictures each, S crossed with the pictures (every model draws on the
same noise), differ by effects of the seed s, the prompt p, the picture k and their interactions:

    d[s,p,k] = δ + A_s + B_p + (AB)_sp + C_pk + E_spk,     d = a − b of the same seed and noise

Resampling all S·P·K numbers alike takes S·P·K for the count of A_s, of which there are S.
"""
from collections import Counter

import torch

from support.training import random_stream


def strata_variances(values, strata):
    """v_h = n_h·s_h²/N² and n_h of each stratum h: their sum is the variance of the mean.

    values: (N,), strata: N labels -> (H,), (H,) in float64. s_h² is the variance within stratum h,
    from n_h − 1: that strata differ adds nothing, because the next sample has the same strata.
    """
    counts = Counter(strata)
    assert len(strata) == len(values) and not values.isnan().any()
    alone = [label for label, n in counts.items() if n < 2]
    if alone:
        raise ValueError(f"a single value of {alone[0]!r} does not say how much such values vary")
    n = torch.tensor(list(counts.values()), dtype=torch.float64)
    s2 = [values[rows_of(strata, label)].double().var() for label in counts]
    return n * torch.stack(s2) / n.sum() ** 2, n


def rows_of(strata, label):
    return torch.tensor([i for i in range(len(strata)) if strata[i] == label])


def degrees_of_freedom(v, n):
    """ν = (Σ_h v_h)²/Σ_h(v_h²/(n_h − 1)) of Σ_h v_h  (Welch, Satterthwaite).   (H,), (H,) -> ()"""
    return v.sum() ** 2 / (v**2 / (n - 1)).sum()


def resampled_deviations(values, strata, stream, draws):
    """δ* = Σ_h √(n_h/(n_h−1)) · Σ_{i in h} (v_i* − v̄_h)/N.   (N,), N labels -> (draws,)

    v_i* are drawn with replacement within stratum h. The root is there because n numbers vary about
    their own mean by (n − 1)/n too little: so δ* has the variance Σ_h v_h of strata_variances.
    """
    deviation = torch.zeros(draws, dtype=torch.float64)
    for label in dict.fromkeys(strata):
        own = values[rows_of(strata, label)].double()
        chosen = torch.from_numpy(stream.integers(len(own), size=(draws, len(own))))
        width = (len(own) / (len(own) - 1)) ** 0.5
        deviation += width * (own - own.mean())[chosen].sum(1) / len(values)
    return deviation


def units_of(values, families=None):
    """What another sample would replace, besides the seeds.  (S,P,K) -> (S,N), N labels of strata

    families None: the mean is of these prompts, and the units are each prompt's pictures.
    families, P labels: of other prompts too; the units are each family's prompts. A prompt's mean
    brings the error of its pictures with it: to resample those as well would count it twice. Where
    a family has one prompt, all families are one stratum; a single prompt speaks for itself only.
    """
    S, P, K = values.shape
    if families is None or P == 1:
        return values.flatten(1), [i // K for i in range(P * K)]
    strata = list(families)
    if 1 in Counter(families).values():
        strata = [0] * P
    return values.mean(2), strata


def unit_share(units, strata):
    """share = 1 − V_SU/V_U ≥ 0 of the variance of the units' means.   (S,N), N labels -> ()

    V_SU is what interactions of seed and unit add to V_U. It is in the variance V_S of the seeds'
    means as well, and counts once: V_S + V_U − V_SU has no bias. (Errors clustered two ways.)
    """
    S, N = units.shape
    V_U = strata_variances(units.mean(0), strata)[0].sum()
    interactions = units - units.mean(0)
    V_SU = sum(strata_variances(row, strata)[0].sum() for row in interactions) / (S * (S - 1))
    return (1 - V_SU / V_U).clamp(min=0).nan_to_num()  # 0 where no unit differs from another


def variances(units, strata):
    """v and n of the seeds, and of the strata of units, these times their share.   (S,N), labels"""
    v_S, n_S = strata_variances(units.mean(1), [0] * len(units))
    v_U, n_U = strata_variances(units.mean(0), strata)
    return v_S, n_S, unit_share(units, strata) * v_U, n_U


def mean_error(values, families=None):
    """x̄, s.e. = √(V_S + share·V_U) over seeds and units.   (S,P,K) -> (float, float)

    Of one seed s.e. = √V_U = √(Σ_h n_h·s_h²)/N: of this training, not of the next.
    """
    units, strata = units_of(values.double(), families)
    if len(units) == 1:
        variance = strata_variances(units[0], strata)[0].sum()
    else:
        v_S, _, v_U, _ = variances(units, strata)
        variance = v_S.sum() + v_U.sum()
    return units.mean().item(), variance.sqrt().item()


def hierarchical_bootstrap(a, b, families=None, seed=0, draws=10000, level=0.95):
    """d̄* = d̄ + √(ν/χ²_ν)·(δ*_S + √share·δ*_U),  d = a − b.   (S,P,K), same -> a dict

    mean, low and high (percentiles of d̄*) and p, two-sided. A model with one seed, such as the
    pretrained, is compared with every seed of the other. From S = 1 nothing can be told.

    families: as units_of takes them.
    Few seeds: plain percentiles of 5 are 1.6 times too narrow. The root in δ* mends 1.12 of it, and
    √(ν/χ²_ν) makes a normal d̄* Student's t, as wide as ν makes V uncertain: also in the far tails
    that Holm's correction looks at. ν is S − 1 where seeds are all that differs.
    """
    d = a.double() - b.double()
    assert a.shape[1:] == b.shape[1:] and not d.isnan().any(), (a.shape, b.shape)
    if len(d) == 1:
        return {"mean": d.mean().item(), "low": -torch.inf, "high": torch.inf, "p": 1.0}
    units, strata = units_of(d, families)
    v_S, n_S, v_U, n_U = variances(units, strata)
    share = unit_share(units, strata)

    stream = random_stream(seed, "bootstrap")
    deviation = resampled_deviations(units.mean(1), [0] * len(d), stream, draws)
    deviation += share.sqrt() * resampled_deviations(units.mean(0), strata, stream, draws)
    nu = degrees_of_freedom(torch.cat([v_S, v_U]), torch.cat([n_S, n_U]))
    nu = nu.nan_to_num(1.0).item()  # where nothing varies at all, none is needed
    sample = d.mean() + deviation * (nu / torch.from_numpy(stream.chisquare(nu, draws))).sqrt()
    low, high = sample.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2]).double())
    beyond = min((sample <= 0).sum().item(), (sample >= 0).sum().item())
    return {"mean": d.mean().item(), "low": low.item(), "high": high.item(),
            "p": min(1.0, 2 * (beyond + 1) / (draws + 1))}


def holm(p):
    """p̃_(i) = max_{j ≤ i} min(1, (m − j + 1)·p_(j)),  p_(1) ≤ … ≤ p_(m)   (Holm 1979).  m -> m

    The claims with p̃ ≤ 0.05 hold together: one is wrong in at most 5 % of all such families.
    """
    adjusted, largest = [0.0] * len(p), 0.0
    for j, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - j) * p[i]))
        adjusted[i] = largest
    return adjusted


def verdict(low, high, p, level=0.05):
    """holds = low > 0 and p̃ ≤ α,  fails = high < 0 and p̃ ≤ α;  p: as holm adjusted it."""
    if p > level or low <= 0 <= high:
        return "cannot be told"
    return "holds" if low > 0 else "fails"
