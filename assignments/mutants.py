"""Wrong answers: each is the right one with one mistake in it, and says in words what is wrong.

They serve three times. A test plants each and demands that the exercise's tests fail: one that
survives is a hole in the tests. grade.py names a student's mistake by them, where both fail alike.
make.py plants three for students to find.

A mistake is a rule for the syntax tree, `shape => what stands there instead  # what is wrong`, and
so outlives a rewording of the line: whatever in the function has this shape is replaced. `_a`, `_b`
stand for any expression, the same one on both sides, and `...` for all other arguments, or for a
whole block. Without a shape a line is put before the answer; the shape `...` is all of the answer.

RUN `python assignments/mutants.py [FUNCTION ...]` (minutes): prints those that no test notices.
"""
import ast
import contextlib
import functools
import re
import sys
import textwrap
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "assignments")]
import cut  # noqa: E402
from exercises import BY_FUNCTION, Exercise  # noqa: E402

RULES = r"""
01_mdp.forward_process
    (1 - _a).sqrt() => 1 - _a  # 1 − ᾱ_t is the noise's variance; it is scaled by the root
    scheduler.alphas_cumprod => scheduler.alphas  # ᾱ_t is the product of all α up to t
    => t = t - 1  # ᾱ is looked up one timestep too early
    => x_0, eps = eps, x_0  # x_0 and ε are swapped
01_mdp.denoising_loss
    _a.mean((1, 2, 3)) => _a.sum((1, 2, 3))  # ‖ε − ε_θ‖² is divided by D: a mean, not a sum
    return _a.mean() => return _a.sum()  # E is a mean over pictures, not a sum
    assert weight.shape == _a => pass  # a weight of another shape than (B,) must be refused
    => eps_pred = eps_pred.detach()  # the value is right, but its gradient is lost
01_mdp.predict_noise
    eps_empty + _a => eps_prompt + _a  # guidance starts from the empty prompt; this is s + 1
    eps_prompt - eps_empty => eps_empty - eps_prompt  # guidance goes toward the prompt
    torch.cat([_a, _b]) => torch.cat([_b, _a])  # the halves of the batch are swapped
    => guidance_scale = 1.0  # the guidance scale is not used
    guidance_scale != 1 => True  # without guidance one half is enough
    _a.to(unet.dtype) => _a  # the network is called in its own dtype
    _a.to(x_t) => _a  # what comes back is in x_t's dtype
01_mdp.ddim_coefficients
    _a.clamp(min=0) => _a  # past the end it is ᾱ_0; an index below 0 counts from the other end
    _a // scheduler.num_inference_steps => _a // scheduler.num_inference_steps - 1  # t − 1 is off
    (1 - _a) / (1 - _b) => (1 - _b) / (1 - _a)  # (1−ᾱ_{t−1})/(1−ᾱ_t) is upside down
    1 - alpha_t / alpha_prev => 1 - alpha_prev / alpha_t  # ᾱ_t/ᾱ_{t−1} is upside down
    _a.sqrt() => _a  # σ_t is a product of two roots; they are missing
    return _a, _b, _c => return _a, _b, _c ** 2  # this is σ², and σ is asked for
    _a.double() => _a  # float32 costs σ_t two digits
01_mdp.step_mean_std
    alpha_prev.sqrt() => alpha_t.sqrt()  # the mean lies at t − 1: x̂_0 is scaled by √ᾱ_{t−1}
    _a.sqrt() * x_0 => _a * x_0  # x̂_0 is scaled by the root of ᾱ_{t−1}
    return _a, _b => return _a, _b ** 2  # this is the variance, and σ is asked for
    _a * eps => _a * noise_pred  # where the model predicts v or x_0, the direction is still ε
01_mdp.step_mean_std 01_mdp.noise_weight
    toward_x_t(_a, _b) => toward_x_t(_a, 0 * _b)  # the new noise takes σ_t² off 1 − ᾱ_{t−1}
01_mdp.step_mean_std 01_mdp.noise_weight 01_mdp.ddim_coefficients
    => eta = 1.0  # η is not used
01_mdp.noise_weight
    _a.abs() => _a  # κ is an absolute value; the derivative is negative
    return _a / sigma_t => return _a / sigma_t ** 2  # κ is divided by σ, not by σ²
    stays - _a => -_a  # the part of ε that stays in the mean is missing
    _a - signal_prev * _b => _a + signal_prev * _b  # where ε or v is, x̂_0 falls as it rises
01_mdp.log_prob
    -0.5 * _a => -_a  # the ½ of the exponent is missing
    -0.5 * _a => 0.5 * _a  # the exponent has the wrong sign
    math.log(2 * math.pi) => 0  # the constant (D/2)·log 2π is missing
    std.log() => 0  # each of the D numbers has its own log σ
    => mean = mean.detach()  # the value is right, but the mean's gradient is lost
01_mdp.kl_divergence
    0.5 * _a => _a  # the ½ is missing
    (_a / std).square() => _a.square() / std  # the distance is divided by σ before it is squared
    => mean_q = mean_q.detach()  # the second mean has lost its gradient
01_mdp.log_prob 01_mdp.kl_divergence
    _a.sum((1, 2, 3)) => _a.mean((1, 2, 3))  # this is a mean over dimensions; sum them
01_mdp.rollout
    _a + std * _b => _a + std ** 2 * _b  # noise is scaled by σ, not by σ²
    log_prob(_a, mean, std) => log_prob(mean, mean, std)  # what was drawn is scored, not its mean
    x_prev = _a => x_prev = mean  # no noise is added
    trajectory.latents[rows, k + 1] = _a => trajectory.latents[rows, k + 1] = _a.bfloat16()
        # what is stored was rounded after it was scored: replayed, its ratio is not 1
    trajectory.means[rows, k] = _a => trajectory.means[rows, k] = x_prev  # means are no samples
    z[:, k + 1] => z[:, 1]  # every step needs noise of its own
    policy_at(_a, _b, _c, k, _d) => policy_at(_a, _b, _c, T - 1 - k, _d)  # time runs the wrong way
    training.gaussians(rows, ...) => training.gaussians(0 * rows, ...)  # each picture has its noise
    models.decode(pipe, _a) => models.decode(pipe, mean)  # the picture is x_0, the last entry
    config.batch_size => 10**9  # the batch size is ignored
    => policy = globals()["policy"]  # the policy that is passed is not used
02_rewards.jpeg_kilobytes
    return _a => return _a * 1000 / 1024  # a kilobyte has 1000 bytes here
    => quality = 75  # the quality is not used
    => image = image.convert("L")  # the picture has lost its colors
    _a.convert("RGB") => _a  # JPEG has no transparency: convert to RGB first
02_rewards.bertscore_recall
    => reference, candidate, counts = candidate, reference, None  # this is precision, not recall
    => counts = None  # the weights are not used
    candidate.norm(...) => candidate.norm()  # each vector is divided by its own length
    _a.max(1).values => _a.mean(1)  # the nearest word counts, not the mean of all
02_rewards.ranks
    => x = -x  # 1 is the rank of the smallest
    ... => return (x.argsort() + 1.0)  # this is each place's value, not each value's place
    ... => return (x.argsort().argsort() + 1).double()  # equal values share a rank
    ... => return (x[:, None] > x).sum(1) + 1.0  # equal values share a mean place, not the first
    ... => return (x[:, None] >= x).sum(1).double()  # equal values share a mean place, not the last
experiments.make_rewards.bradley_terry_loss
    => better, worse = worse, better  # the better one should win
    _a.mean() => _a.sum()  # a mean over pairs is asked for
    ... => return -(better - worse).sigmoid().log().mean()  # a large difference overflows
03_ddpo.mean_of_others
    ... => return torch.stack([values[[p == q for q in prompts]].mean(0) for p in prompts])
        # the baseline holds the picture's own value: leave it out
    _a.mean(0) => _a.sum(0) / len(prompts)  # divide by how many others there are
03_ddpo.leave_one_out_advantage
    spread(_a) => (_a.std(unbiased=False) + 1e-8)  # a small number moves every advantage a little
    _a / spread(_b) => _a  # the advantage is not divided by the spread
    return _a => return _a.float()  # the advantages are asked for in float64
03_ddpo.running_advantage
    _a[-keep:] => _a[:keep]  # the last `keep` rewards count; this keeps the first ones
    _a[-keep:] => _a  # only the last `keep` rewards stay in the history
    _a >= min_count => _a > min_count  # min_count rewards are enough
    known.mean() => r.mean()  # the mean is the prompt's own, over its history
03_ddpo.running_advantage 03_ddpo.leave_one_out_advantage
    spread(_a) => _a.std()  # the spread divides by how many there are, not by one less
    spread(_a) => _a.std(unbiased=False)  # equal rewards divide 0 by 0
03_ddpo.step_weights
    return _a => return _a / len(_a)  # the weights have mean 1, not sum 1
    1 / _a => _a  # σ/κ is asked for; this is κ/σ
    _a / _a.mean() => _a  # the weights are not divided by their mean
    config.step_weight == _a => config.step_weight != _a  # `none` and `sigma` are swapped
    models.set_timesteps(...) => pass  # the scheduler is not set to the config's number of steps
03_ddpo.step_weights 04_dpok.path_kl
    config.eta => 1.0  # --eta is not used
03_ddpo.step_pairs
    max(1, _a) => _a  # at least one step of each picture is kept
    => n = 0  # each round draws steps of its own
    config.timestep_fraction => 1.0  # --timestep-fraction is not used
    return _a, _b => return _b, _a  # pictures come first, then steps
03_ddpo.step_pairs experiments.sft.sparse_weights
    round(_a) => int(_a)  # the number is rounded, not cut off
03_ddpo.ddpo_sf_objective
    => log_prob = log_prob.exp()  # ∇ log p is asked for; this is the gradient of p
    => advantage = advantage.abs()  # the advantage has lost its sign
    => advantage = torch.ones_like(advantage)  # the advantage is not used
    => log_prob = log_prob.detach()  # the value is right, but its gradient is lost
03_ddpo.ddpo_is_objective 04_dpok.dpok_objective
    (log_prob - old_log_prob).exp() => log_prob / old_log_prob
        # a ratio of probabilities is exp of a difference of logs; a quotient of logs is 1, too
    => log_prob, old_log_prob = old_log_prob, log_prob  # the ratio is upside down
    torch.minimum(_a, _b) => _b  # without min nothing leads back into the band
    torch.minimum(_a, _b) => torch.maximum(_a, _b)  # PPO takes the smaller of the two
    torch.minimum(_a, _b) => _a  # nothing is clipped
    torch.minimum(_a * advantage, _b * advantage) => torch.minimum(_a, _b) * advantage
        # min is of the two terms, not of the two ratios
    _a.clamp(1 - clip_range, 1 + clip_range) => _a.clamp(max=1 + clip_range)  # it has a lower side
    _a.clamp(1 - clip_range, 1 + clip_range) => _a.clamp(min=1 - clip_range)  # it has an upper side
    1 - clip_range => 1 / (1 + clip_range)  # the band is 1 − ε to 1 + ε
03_ddpo.reinforce 03_ddpo.train 04_dpok.train
    _a * step_weight => _a  # the step weights are not used
    -J.sum() * _a => J.sum() * _a  # the loss is minus the objective
    -J.sum() * _a => -J.mean() * _a  # the gradient depends on how many batches it is worked in
    scale = _a => scale = 1 / len(i)  # the steps of a picture are summed; this is their mean
    trajectory.latents[i, k + 1] => trajectory.latents[i, k]  # the action is the next latent
    optimizer.step() => pass  # no step is taken
    optimizer.zero_grad() => pass  # gradients of earlier steps stay
03_ddpo.reinforce 04_dpok.train
    mdp.rollout(_a, _b, _c, _d, n) => mdp.rollout(_a, _b, _c, _d, 0)  # each round has its own noise
03_ddpo.train
    mdp.rollout(_a, _b, _c, _d, n, _e) => mdp.rollout(_a, _b, _c, _d, 0, _e)
        # each round has its own noise
    => policy = mdp.policy  # the policy that is passed is not used
    => advantages = globals()["advantages"]  # the advantages that are passed are not used
03_ddpo.train 04_dpok.train
    old_log_prob = _a => old_log_prob = log_prob.detach()  # the ratio is to the policy that drew
    _a.tensor_split(_b) => _a.tensor_split(1)  # a round has one update instead of K
    training.permutation(B, ...) => torch.arange(B)  # the pictures are not shuffled
    clip_grad_norm_(params, _a) => clip_grad_norm_(params, 1.0)  # the bound is --max-grad-norm
experiments.flow.flow_time
    (1 - _a).sqrt() => 1 - _a  # the share of noise is the root of 1 − ᾱ
    noise / c => signal / c  # s is the share of noise: it is near 1 where the picture begins
    signal + noise => 1  # the shares of x_0 and ε must add up to 1
    return _a, _b => return _a, 1 / _b  # c is asked for, not 1/c
experiments.flow.sde_step
    s_prev - s => s - s_prev  # time runs from 1 to 0: dt = s' − s is negative
    (1 - s) * v => s * v  # ε̂ = x̃ + (1−s)·v; with −s it would be x̂_0
    v + _a => v - _a  # the term with ε̂ has the sign of v
    2 * s => 2  # ε̂ is divided by 2s
    (-dt).sqrt() => -dt  # σ = g·√(−dt)
    return _a, std => return _a, g * torch.ones_like(std)  # σ = g·√(−dt)
experiments.flow.flow_kl
    -dt / 2 * _a => 1 / 2 * _a  # −dt is missing, as in published code
    1 / g + _a => 1 / g  # ε̂ moves with v, too
    _a.sum((1, 2, 3)) => _a.mean((1, 2, 3))  # this is a mean over dimensions; sum them
04_dpok.train
    baseline.fit(...) => pass  # the value function is never fitted
    baseline.predict(_a) => 0 * baseline.predict(_a)  # the value function is not used
    with reference(): ... => if True: ...  # the reference's means are those of the tuned model
    reference_means[i, k] => trajectory.means[i, k]  # the KL is to the reference
    A[i, k] => A[i, 0 * k]  # each step has an advantage of its own
04_dpok.dpok_objective
    => beta = -beta  # the KL is a price: it is taken off
    => kl = kl.detach()  # the KL has lost its gradient
    => beta = alpha * beta  # α weighs the reward only
    => alpha = 1.0  # α is not used
04_dpok.step_means
    return _a => return _a.flip(1)  # each mean belongs to its own step
    return _a => return trajectory.means  # these are of the policy that drew, not the present one
    mdp.policy_at(_a, _b, _c, k, _d) => mdp.policy_at(_a, _b, _c, 0, _d)  # this is the first step
04_dpok.path_kl
    return _a => return _a.flip(1)  # each step has its own KL
    => reference_means = reference_means.roll(1, 1)  # the two means are of different steps
04_dpok.Value.fit
    self.rounds[-_a:] => self.rounds[:_a]  # the latest rounds count; this keeps the first ones
    self.rounds[-_a:] => self.rounds  # only the latest rounds are kept
    (_a - _b) / self.std => _a - _b  # the squared error is that of (r − mean)/std
    _a + 1e-6 => _a  # equal rewards divide by 0
    self.optimizer.step() => pass  # no step is taken
    self.optimizer.zero_grad() => pass  # gradients of earlier steps stay
    for rows in _a: ... => for rows in 2 * list(_a): ...  # one pass is asked for; this makes two
    training.permutation(_a, ...) => torch.arange(_a)  # the order is not drawn
    => n = 0  # every round has the same order
    => batch_size = 10**9  # each batch_size rows are a step
04_dpok.value_advantage
    => r, V = -r, -V  # the advantage is r − V, not V − r
    ... => return r.to(V)[:, None] - V  # the others' mean of r − V is not taken off
    => V = 0 * V  # V is not used
    ddpo.mean_of_others(_a, _b) => ddpo.mean_of_others(_a + V, _b)  # it is of r − V, not of r
support.models.make_reference
    tuned.disable_adapters() => pass  # the adapters stay on: it is the tuned model
    tuned.enable_adapters() => pass  # the adapters stay off afterwards
    copy.deepcopy(_a) => _a  # the reference is the same network, so it is trained along
    _a.requires_grad_(False) => _a  # the copy has gradients: it must be frozen
    frozen is None and _a => frozen is None  # with adapters no second network is needed
    pipe.unet = tuned => pass  # the tuned model is not put back
    try: yield\nfinally: ... => yield\n...  # after an error inside, the tuned model is not put back
    => frozen = None  # the frozen network that is given is not used
05_eval.interval
    => d = -d  # the sign is that of d
    d.std(ddof=1) => d.std()  # s² divides by S − 1
    _a / S ** 0.5 => _a  # the error of a mean is s/√S
    S - 1 => S  # there are S − 1 degrees of freedom
    _a.ppf(_b) => _a.ppf(0.95)  # an interval of 95 % leaves out 2.5 % on each side
    2 * _a => _a  # p has two sides
    stats.t(_a) => stats.norm()  # from few seeds the interval is Student's, wider than the normal
    mean - half => mean + half  # the lower end is below the mean
05_eval.holm
    ... => return np.minimum(1, len(p) * np.asarray(p))  # this is Bonferroni's: all p times m
    np.maximum.accumulate(_a) => _a  # an adjusted p may not be below that of a smaller p
    np.arange(m, 0, -1) => np.arange(1, m + 1)  # the smallest p gets the largest factor
    adjusted[order] = _a => adjusted[:] = _a  # the results are in the order of the input
support.measures.diversity
    1 - f @ f.T => f @ f.T  # this is similarity; distance is 1 − cos
    N - 1 => N  # a picture has N − 1 others
    _a.sum(1) => _a.sum()  # each picture has a number of its own
    _a.norm(dim=1, keepdim=True) => _a.norm()  # each vector is divided by its own length
05_eval.best_of_n_kl
    return _a => return math.log(n)  # (n − 1)/n is taken off log n
    math.log(_a) => math.log2(_a)  # nats are asked for: the natural logarithm
05_eval.best_of_n_weights
    => r = -r  # the worst is kept
    N * _a => _a  # weights have mean 1, not sum 1
    _a / m => _a  # pictures with the same reward share evenly
    last - m => last - 1  # F(r⁻) leaves out all pictures with that very reward
    w[place] => w[place.sort().values]  # the weights are in the order of r
    (last / N) ** n => last / N  # all n draws are up to r: a power of n
    ((last - m) / N) ** n => (last - m) / N  # all n draws are below r: a power of n
experiments.sft.rwr_weights
    => temperature = 1 / temperature  # rewards are divided by the temperature τ
    _a * len(rows) => _a  # the weights of a prompt have mean 1, not sum 1
    _a.softmax(0) => _a.exp()  # the weights are not normalized
experiments.sft.rwr_weights experiments.sft.sparse_weights
    => reward = -reward  # the worst pictures weigh most
experiments.sft.sparse_weights
    max(1, _a) => _a  # at least one picture of a prompt is kept
    return _a => return (_a > 0).to(_a)  # those that are kept weigh 1/share
03_ddpo.leave_one_out_advantage 04_dpok.value_advantage experiments.sft.rwr_weights
    => prompts = [""] * len(prompts)  # only pictures of the same prompt belong together
03_ddpo.leave_one_out_advantage 03_ddpo.running_advantage 03_ddpo.ddpo_sf_objective
    return _a => return -_a  # the sign is wrong: what is better must be larger
experiments.make_rewards.bradley_terry_loss 05_eval.best_of_n_kl 03_ddpo.ddpo_is_objective
    return _a => return -_a  # the sign is wrong
01_mdp.denoising_loss 01_mdp.log_prob 01_mdp.kl_divergence 04_dpok.Value.fit
    _a.square() => _a.abs()  # this is the absolute value, not the square
"""


@dataclass(frozen=True)
class Mutant:
    exercise: Exercise
    shape: str  # of what is right, as above
    instead: str
    words: str  # what is wrong, for the student

    def text(self):
        """The wrong function."""
        return planted(right_text(self.exercise), self.shape, self.instead)


@functools.cache
def right_text(exercise):
    return cut.function_text((ROOT / exercise.file).read_text(encoding="utf-8"), exercise.name)


def read_rules(rules):
    """One mutant for each rule and each function named above it."""
    mutants = []
    for line in re.sub(r"\n +#", "  #", rules.strip()).splitlines():  # one line a rule
        if line.startswith(" "):
            rule, words = line.split("  # ")
            shape, instead = rule.replace("\\n", "\n").split("=>")
            mutants += [Mutant(BY_FUNCTION[function], shape.strip(), instead.strip(), words)
                        for function in functions]
        else:
            functions = line.split()
    return mutants


# ---- planting -------------------------------------------------------------------------------


def planted(text, shape, instead):
    """The function's text with the mistake in it; ValueError where nothing has the shape."""
    answer = cut.answer_of(ast.parse(text).body[0])
    if shape in ("", "..."):
        lines, first = text.splitlines(), answer[0].lineno - 1
        instead = textwrap.indent(instead, " " * answer[0].col_offset)
        return "\n".join([*lines[:first], instead, *([] if shape else lines[first:])]) + "\n"
    wanted, source = ast.parse(shape).body[0], text.encode()
    wanted = wanted.value if isinstance(wanted, ast.Expr) else wanted
    starts, places = [0], []
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node in (node for part in answer for node in ast.walk(part)):  # the outer ones first
        parts = {}
        if match(wanted, node, parts):
            start = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            if not any(first <= start and end <= last for first, last, _, _ in places):
                places.append((start, end, parts, node.col_offset))
    if not places:
        raise ValueError(f"nothing has the shape of {shape!r}")
    for start, end, parts, indent in sorted(places, key=lambda place: -place[0]):
        new = ast.unparse(Fill(parts).visit(ast.parse(instead)))
        new = new.replace("\n", "\n" + " " * indent)
        safe = source[:start] + f"({new})".encode() + source[end:]
        source = plain = source[:start] + new.encode() + source[end:]
        with contextlib.suppress(SyntaxError):  # around a statement there are no brackets
            if ast.dump(ast.parse(safe)) != ast.dump(ast.parse(plain)):
                source = safe
    return source.decode()


def match(wanted, node, parts):
    """Whether the node has this shape; `parts` gets what _a, _b and ... stand for in it."""
    if isinstance(wanted, ast.Name) and wanted.id.startswith("_"):
        same = parts.setdefault(wanted.id, node)
        return isinstance(node, ast.expr) and ast.unparse(same) == ast.unparse(node)
    if type(wanted) is not type(node):
        return False
    for field, inner in ast.iter_fields(wanted):
        value = getattr(node, field)
        if isinstance(inner, list):
            if inner and is_rest(inner[-1]):
                inner = inner[:-1]
                parts[...] = value[len(inner):], getattr(node, "keywords", [])
                value = value[:len(inner)]
            elif field == "keywords" and ... in parts and not inner:
                continue
            if len(inner) != len(value) or not all(map(match, inner, value, [parts] * len(value))):
                return False
        elif isinstance(inner, ast.AST):
            if field != "ctx" and not match(inner, value, parts):
                return False
        elif field != "kind" and inner != value:
            return False
    return True


def is_rest(node):
    node = node.value if isinstance(node, ast.Expr) else node
    return isinstance(node, ast.Constant) and node.value is ...


class Fill(ast.NodeTransformer):
    """Puts what _a, _b and ... stand for into a tree."""

    def __init__(self, parts):
        self.parts = parts

    def visit_Name(self, node):
        return self.parts.get(node.id, node)

    def visit_Call(self, node):
        if node.args and is_rest(node.args[-1]):
            node.keywords += self.parts[...][1]
        return self.generic_visit(node)

    def visit_Constant(self, node):
        return self.parts[...][0] if is_rest(node) else node

    def visit_Expr(self, node):
        return self.parts[...][0] if is_rest(node) else self.generic_visit(node)


MUTANTS = read_rules(RULES)


def survivors(functions, known="runs/known_mistakes.json"):
    """(function, words, why) of what no test notices; a crash or a time limit is no notice."""
    grade = import_module("grade")  # which imports this file
    table = grade.known_mistakes(functions, grade.Config(".", known=known))
    return [(function, words, reason or "passed") for function in functions
            for failure, words, reason in table[function] if not failure]


if __name__ == "__main__":
    alive = survivors(sys.argv[1:] or list(BY_FUNCTION))
    print(*alive, f"{len(alive)} wrong answers are not noticed", sep="\n")
    sys.exit(bool(alive))
