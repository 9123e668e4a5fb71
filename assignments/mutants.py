"""Wrong answers: each is the right function with one small change, and says in words what is wrong.

They serve three times. A test plants each and demands that the exercise's tests fail: one that
survives is a hole in the tests. grade.py names a student's mistake by them, where both fail with
the same numbers. make.py plants three for students to find. Those in LOOPS are in functions that
are no exercise; each names the tests that must fail.

RUN `python assignments/mutants.py` (five minutes on two cores): plants each, and prints those that
no test notices. Words behind it, such as `03_ddpo.accumulate`, choose functions.
"""
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "assignments")]
import cut  # noqa: E402
from exercises import BY_FUNCTION, split  # noqa: E402

MISTAKES = {  # function -> (text in it, what stands there instead, what is wrong)
    "01_mdp.forward_process": (
        ("alpha_t.sqrt() * x_0", "alpha_t * x_0", "the signal is scaled by √ᾱ_t, not by ᾱ_t"),
        ("(1 - alpha_t).sqrt() * eps", "(1 - alpha_t) * eps",
         "1 − ᾱ_t is the noise's variance; it is scaled by the root"),
        ("alphas_cumprod.to", "alphas.to",
         "ᾱ_t is the product of all α up to t, alphas_cumprod; this uses α_t of one step"),
        ("[t.to(x_0.device)]", "[t.to(x_0.device) - 1]", "ᾱ is looked up one timestep too early"),
        ("alpha_t.sqrt() * x_0 + (1 - alpha_t).sqrt() * eps",
         "alpha_t.sqrt() * eps + (1 - alpha_t).sqrt() * x_0", "x_0 and ε are swapped")),
    "01_mdp.denoising_loss": (
        (".mean((1, 2, 3))", ".sum((1, 2, 3))", "‖ε − ε_θ‖² is divided by D: a mean, not a sum"),
        ("error = weight * error", "error = weight / weight.sum() * error",
         "the weights are used as they are; here they are made to sum to 1 first"),
        ("return error.mean()", "return error.sum()",
         "E is a mean over pictures; a sum makes the learning rate depend on how many there are"),
        (".square()", ".abs()", "the error is squared, not its absolute value"),
        ("assert weight.shape == error.shape, (weight.shape, error.shape)", "pass",
         "a weight of another shape than (B,) must be refused")),
    "01_mdp.predict_noise": (
        ("eps_empty + guidance_scale * (eps_prompt - eps_empty)",
         "eps_prompt + guidance_scale * (eps_prompt - eps_empty)",
         "guidance starts from the empty prompt's prediction; this is a scale of s + 1"),
        ("eps_empty + guidance_scale * (eps_prompt - eps_empty)",
         "eps_empty + guidance_scale * (eps_empty - eps_prompt)",
         "guidance goes from the empty prompt towards the prompt; this goes away from it"),
        ("torch.cat([negative_embeds.expand_as(prompt_embeds), prompt_embeds])",
         "torch.cat([prompt_embeds, negative_embeds.expand_as(prompt_embeds)])",
         "the halves of the batch are swapped: the first half must be the empty prompt, as it is "
         "read below"),
        ("eps.chunk(2)", "(eps[::2], eps[1::2])",
         "the halves of a batch are its first and its second half, not every other row")),
    "01_mdp.ddim_coefficients": (
        ("past_the_end = previous < 0",
         "previous = previous.clamp(min=0)\n    past_the_end = previous < 0",
         "the index is clamped before it is asked whether it is past the end, so "
         "final_alpha_cumprod is never used"),
        ("scheduler.final_alpha_cumprod.to(table)", "1.0",
         "the last step ends on the scheduler's final_alpha_cumprod, which need not be 1"),
        ("// scheduler.num_inference_steps", "// scheduler.num_inference_steps - 1",
         "the previous timestep is off by one"),
        ("((1 - alpha_prev) / (1 - alpha_t)).sqrt()", "((1 - alpha_prev) / (1 - alpha_t))",
         "σ_t is a product of two roots; one of them is missing"),
        ("(1 - alpha_t / alpha_prev).sqrt()", "(1 - alpha_prev / alpha_t).sqrt()",
         "the quotient ᾱ_t/ᾱ_{t−1} is upside down"),
        ("eta * sigma_t", "sigma_t", "η is not used"),
        ("eta * sigma_t", "(eta * sigma_t) ** 2", "this is σ², and σ is asked for")),
    "01_mdp.step_mean_std": (
        ("1 - alpha_prev - sigma_t**2", "1 - alpha_prev",
         "the new noise takes σ_t² of the variance 1 − ᾱ_{t−1}; it is not taken off here"),
        ("1 - alpha_prev - sigma_t**2", "1 - alpha_prev - sigma_t",
         "σ_t² is taken off a variance, not σ_t"),
        ("alpha_prev.sqrt() * x_0", "alpha_t.sqrt() * x_0",
         "the mean lies at time t − 1: x̂_0 is scaled by √ᾱ_{t−1}"),
        ("sigma_t.to(x_t.dtype)", "(sigma_t**2).to(x_t.dtype)",
         "the variance is returned where the standard deviation is asked for"),
        ("direction * eps", "direction * noise_pred.to(work)",
         "where the model predicts v or x_0, the direction is still ε, from x0_and_noise"),
        ("(scheduler, t, eta)", "(scheduler, t)", "η is not passed on")),
    "01_mdp.log_prob": (
        (".sum((1, 2, 3))", ".mean((1, 2, 3))",
         "this is a mean over dimensions; sum them: only then is exp(log p − log p_old) a ratio "
         "of probabilities"),
        ("-0.5 * distance", "-distance", "the ½ of the exponent is missing"),
        ("- D * log_sigma", "- log_sigma", "each of the D numbers has its own log σ"),
        ("- D * log_sigma", "+ D * log_sigma", "log σ has the wrong sign"),
        (" - 0.5 * D * math.log(2 * math.pi)", "", "the constant (D/2)·log 2π is missing"),
        ("torch.where(std > 0, density, 0)", "density",
         "a row with σ = 0 has no density: it counts 0"),
        ("-0.5 * distance", "-0.5 * distance.detach()",
         "the value is right, but its gradient is lost: something is detached")),
    "01_mdp.kl_divergence": (
        ("0.5 * ", "", "the ½ is missing"),
        (".sum((1, 2, 3))", ".mean((1, 2, 3))", "this is a mean over dimensions; sum them"),
        ("mean_p, mean_q, std).", "mean_p, mean_q, std**2).",
         "the distance is divided by σ and then squared; here it is divided by σ²"),
        (".square()", ".abs()", "the distance is squared"),
        ("mean_p, mean_q, std).", "mean_p, mean_q.detach(), std).",
         "the second mean has lost its gradient")),
    "01_mdp.noise_weight": (
        ("mean.abs() / sigma", "mean / sigma",
         "κ is an absolute value; the derivative is negative"),
        ("mean.abs() / sigma", "mean.abs() / sigma**2", "κ is divided by σ, not by σ²"),
        ("mean.abs() / sigma, torch.inf", "mean.abs() / sigma, 0.0",
         "where σ = 0 the weight is infinite, not 0"),
        ("0 * one", "one", "with x = 1 the mean is not only what ε adds to it"),
        ("0 * one, eta)", "0 * one)", "η is not passed on"),
        ("if scheduler.config.clip_sample:", "if False:",
         "with clip_sample the mean is not linear, so there is no such weight: refuse it")),
    "01_mdp.rollout": (
        ("std * z[k]", "std**2 * z[k]", "noise is scaled by σ, not by σ²"),
        ("log_prob(x_t, mean, std)", "log_prob(mean, mean, std)",
         "the action that was drawn is scored, not its mean"),
        ("latents[rows, k + 1] = x_t.cpu()", "latents[rows, k + 1] = mean.cpu()",
         "what is stored is not what was scored"),
        ("latents[rows, k + 1] = x_t.cpu()", "latents[rows, k + 1] = x_t.bfloat16().float().cpu()",
         "what is stored was rounded after it was scored, so a replay gives another ratio than 1"),
        ("latents[rows, 0] = x_t.cpu()", "latents[rows, 0] = z[0].cpu()",
         "the chain's first entry is x_T"),
        ("means[rows, k] = mean.cpu()", "means[rows, k] = x_t.cpu()",
         "the means are stored, not the samples"),
        ("timesteps[k], prompt", "timesteps[T - 1 - k], prompt", "time runs the wrong way"),
        ("latents[:, -1]", "latents[:, 0]", "the picture is x_0, the chain's last entry"),
        ("z[k]\n", "z[0]\n", "every step needs noise of its own"),
        ("*noise, i)", "*noise)", "every picture needs noise of its own, by its place i")),
    "02_rewards.jpeg_kilobytes": (
        ("/ 1000", "/ 1024", "a kilobyte has 1000 bytes here"),
        ("quality=quality", "quality=75", "the quality is not used"),
        ('convert("RGB")', 'convert("L")', "the picture has lost its colors"),
        ('image.convert("RGB").save', "image.save",
         "JPEG has no transparency: convert to RGB first")),
    "02_rewards.bertscore_recall": (
        ("(r @ c.T).max(1)", "(c @ r.T).max(1)",
         "this is precision: recall asks for each word of the reference"),
        ("/ w.sum()", "/ len(w)", "divide by the sum of the weights, not by how many there are"),
        ("r = reference / reference.norm(dim=-1, keepdim=True)", "r = reference",
         "cosines need vectors of length 1"),
        ("candidate.norm(dim=-1, keepdim=True)", "candidate.norm()",
         "each vector is divided by its own length"),
        (".max(1).values", ".mean(1)", "the nearest word counts, not the mean of all")),
    "02_rewards.ranks": (
        ("(count - 1) / 2", "(count - 1)", "equal values share the mean of their places, not the "
         "first of them"),
        ("(last - (count - 1) / 2)", "last",
         "equal values share the mean of their places, not the last of them"),
        ("count.cumsum(0)", "count.cumsum(0) - 1", "ranks begin with 1"),
        ("(last - (count - 1) / 2)[place].double()", "x.argsort().double() + 1",
         "argsort says where each place's value is, not each value's place")),
    "experiments.make_rewards.bradley_terry_loss": (
        ("-F.logsigmoid", "F.logsigmoid", "a loss is minus the log of the probability"),
        ("better - worse", "worse - better", "the better one should win"),
        (".mean()", ".sum()", "a mean over pairs is asked for"),
        ("F.logsigmoid(better - worse)", "(better - worse).sigmoid().log()",
         "log of a sigmoid overflows where the difference is large: use logsigmoid")),
    "03_ddpo.ddpo_sf_objective": (
        ("log_prob * advantage", "-log_prob * advantage",
         "the objective is to be raised; the loss has the minus"),
        ("log_prob * advantage", "log_prob.exp() * advantage",
         "∇ log p is asked for; this is the gradient of p"),
        ("log_prob * advantage", "log_prob * advantage.abs()", "the advantage has lost its sign"),
        ("log_prob * advantage", "log_prob", "the advantage is not used")),
    "03_ddpo.ddpo_is_objective": (
        ("(log_prob - old_log_prob).exp()", "log_prob / old_log_prob",
         "a ratio of probabilities is the exponential of a difference of logs; a quotient of logs "
         "is 1 at θ_old too, but its gradient points elsewhere"),
        ("(log_prob - old_log_prob).exp()", "(old_log_prob - log_prob).exp()",
         "the ratio is upside down"),
        ("torch.minimum(ratio * advantage, clipped * advantage)", "clipped * advantage",
         "without min there is no gradient outside the band, also where it would lead back"),
        ("torch.minimum(", "torch.maximum(", "PPO takes the smaller of the two"),
        ("torch.minimum(ratio * advantage, clipped * advantage)", "ratio * advantage",
         "nothing is clipped"),
        ("ratio.clamp(1 - clip_range, 1 + clip_range)", "ratio.clamp(max=1 + clip_range)",
         "the band has a lower side, too"),
        ("ratio.clamp(1 - clip_range, 1 + clip_range)", "ratio.clamp(-clip_range, clip_range)",
         "the band is around 1, not around 0"),
        ("return torch", "return -torch", "the objective is to be raised; the loss has the minus")),
    "03_ddpo.step_weights": (
        ("weight / weight.mean()", "weight / weight.sum()",
         "the weights have mean 1, not sum 1"),
        ("1 / mdp.noise_weight", "mdp.noise_weight", "σ/κ is asked for; this is κ/σ"),
        (", config.eta)", ")", "--eta is not passed on"),
        ("(weight / weight.mean())", "weight", "the weights are not divided by their mean"),
        ('"none"', '"sigma"', "`none` and `sigma` are swapped"),
        ("scheduler.set_timesteps(config.num_steps)", "pass",
         "the scheduler is not set to the config's number of steps"),
        (".float()", "", "the weights are asked for in float32")),
    "03_ddpo.mean_of_others": (
        ("other == prompt and j != i", "other == prompt",
         "the baseline holds the picture's own value: leave it out"),
        ("other == prompt and j != i", "j != i", "only pictures of the same prompt count"),
        ("values[others].mean(0)", "values[others].sum(0) / len(prompts)",
         "divide by how many others there are, not by all pictures"),
        (".mean(0)", ".mean()", "every step has a mean of its own"),
        ("if not others:", "if False:",
         "a picture without others has no baseline: raise an error")),
    "03_ddpo.leave_one_out_advantage": (
        ("(scale if scale > 1e-6 else 1)", "(scale if scale > 1e-6 else 1) * 1.0 // 1",
         "the quotient is rounded down"),
        ("(r - mean_of_others(r, prompts)) / (scale if scale > 1e-6 else 1)",
         "((r - mean_of_others(r, prompts)) / (scale if scale > 1e-6 else 1)).to(reward.dtype)",
         "whole-numbered rewards cut the advantages to whole numbers"),
        ("r - mean_of_others(r, prompts)", "r - r.mean()",
         "the baseline is the mean of the same prompt's other pictures, not of all"),
        ("mean_of_others(r, prompts)", "mean_of_others(r, [\"\"] * len(prompts))",
         "only pictures of the same prompt count"),
        ("std(unbiased=False)", "std()", "the spread divides by B here, not by B − 1"),
        ("(scale if scale > 1e-6 else 1)", "scale", "equal rewards divide 0 by 0"),
        ("(scale if scale > 1e-6 else 1)", "(scale + 1e-8)",
         "a small number is added to the spread, and moves every advantage a little"),
        ("(r - mean_of_others(r, prompts))", "(mean_of_others(r, prompts) - r)",
         "the sign is wrong: a better reward must give a larger advantage"),
        (" / (scale if scale > 1e-6 else 1)", "", "the advantage is not divided by the spread")),
    "03_ddpo.running_advantage": (
        ("[-keep:]", "[:keep]", "the last `keep` rewards count; this keeps the first ones"),
        (">= min_count", "> min_count", "min_count rewards are enough"),
        ("(reward[i] - known.mean())", "(reward[i] - reward.double().mean())",
         "the mean is the prompt's own, over its history"),
        ("[*history.get(prompt, []), value]", "[value]", "the rewards of before are forgotten"),
        ("known.std(unbiased=False)", "known.std()", "the spread divides by N here, not by N − 1"),
        ("[*history.get(prompt, []), value][-keep:]", "[*history.get(prompt, []), int(value)]"
         "[-keep:]", "rewards are cut to whole numbers"),
        ("scale if scale > 1e-6 else 1", "scale", "equal rewards divide 0 by 0")),
    "support.training.minibatches": (
        ("torch.from_numpy(order)", "torch.arange(samples)", "the pictures are not shuffled"),
        ('"minibatches", n)', '"minibatches")', "every round has the same order"),
        (".tensor_split(updates)", ".split(max(1, samples // updates))",
         "where the pictures do not divide evenly, there is a part too many"),
        (".permutation(samples)", ".integers(samples, size=samples)",
         "some pictures come twice and others never")),
    "03_ddpo.accumulate": (
        ("-J.sum() * T * share", "-J.sum() * share",
         "the steps of a picture are summed; this is their mean, T times too small"),
        ("-J.sum() * T * share", "J.sum() * T * share", "the loss is minus the objective"),
        ("-J.sum() * T * share", "-J.sum() * T * share_of_useful",
         "pairs without an advantage add nothing, but are counted in the mean"),
        ("-J.sum() * T * share", "-J.mean() * T",
         "the gradient must not depend on how many batches it is worked in"),
        ("trajectory.latents[i, k + 1]", "trajectory.latents[i, k]",
         "the action is the next latent, k + 1; this scores the state itself"),
        ("old_log_prob = trajectory.log_probs[i, k]", "old_log_prob = log_prob.detach()",
         "the ratio is to the policy that drew the picture, whose log-probs are stored"),
        ("log_prob / D, old_log_prob / D", "log_prob / D, old_log_prob",
         "both log-probs are divided by D, or neither"),
        ("kl_old.sum().item() * T *", "kl_old.sum().item() *",
         "the KL of a path is a sum over its steps"),
        ("mdp.kl_divergence(trajectory.means[i, k], mean, std)",
         "mdp.kl_divergence(mean.detach(), mean, std)",
         "the KL is between the policy that drew the picture and the present one"),
        ("(advantage[all_i, all_k].abs() > 1e-9)", "(advantage[all_i, all_k].abs() > 0)",
         "rewards that are equal but for rounding leave |A| up to 1e-9: leave these pairs out"),
        ("(advantage[all_i, all_k].abs() > 1e-9)", "(advantage[all_i, all_k] > 1e-9)",
         "bad pictures teach, too: their advantage is below 0"),
        ("slope.any()", "slope.all()",
         "where a part of a batch is clipped flat, the rest of it still counts")),
    "04_dpok.dpok_objective": (
        ("- beta * kl", "+ beta * kl", "the KL is a price: it is taken off"),
        ("- beta * kl", "- beta * kl.detach()", "the KL has lost its gradient"),
        ("alpha * surrogate - beta * kl", "alpha * (surrogate - beta * kl)",
         "α weighs the reward only"),
        ("alpha * surrogate", "surrogate", "α is not used"),
        ("(log_prob - old_log_prob).exp()", "log_prob / old_log_prob",
         "a ratio of probabilities is the exponential of a difference of logs"),
        ("torch.minimum(ratio * advantage, clipped * advantage)", "clipped * advantage",
         "without min there is no gradient outside the band, also where it would lead back"),
        ("1 - clip_range, 1 + clip_range", "1 / (1 + clip_range), 1 + clip_range",
         "the band is 1 − ε to 1 + ε")),
    "04_dpok.step_means": (
        ("means[i, k] =", "means[i, T - 1 - k] =", "each mean belongs to its own step"),
        ("torch.arange(B).repeat_interleave(T)", "torch.arange(B).repeat(T)",
         "pictures and steps run side by side, so most pairs are never looked at"),
        ("mdp.policy_at(pipe, trajectory, i, k, config)[0].cpu()", "trajectory.means[i, k]",
         "these are the means of the policy that drew the pictures, not of the present one"),
        ("pipe, trajectory, i, k, config", "pipe, trajectory, i, 0 * k, config",
         "every step is looked at as if it were the first")),
    "04_dpok.path_kl": (
        ("std[k]", "std[0]", "each step has its own σ"),
        ("reference_means[:, k]", "reference_means[:, k - 1]",
         "the two means are of different steps"),
        ("config.eta)[2]", "1.0)[2]", "--eta is not passed on"),
        ("std[k].to(kl)", "(std[k] ** 2).to(kl)", "this passes σ² where σ is asked for")),
    "04_dpok.value_advantage": (
        ("reward[:, None] - V", "V - reward[:, None]", "the advantage is r − V, not V − r"),
        ("difference - ddpo.mean_of_others(difference, prompts)", "difference",
         "the others' mean of r − V is not taken off"),
        ("ddpo.mean_of_others(difference, prompts)", "difference.mean(0)",
         "the baseline holds the picture's own value, and those of other prompts"),
        ("ddpo.mean_of_others(difference, prompts)",
         "ddpo.mean_of_others(reward[:, None].expand_as(V), prompts)",
         "the others' mean is of r − V, not of r")),
    "04_dpok.Value.fit": (
        (".repeat_interleave(T)", ".repeat(T)",
         "rewards stand beside the wrong pictures: all steps of a picture come in a row"),
        ("[-self.config.value_rounds:]", "[:self.config.value_rounds]",
         "the latest rounds count; this keeps the first ones"),
        ("(target - self.mean) / self.std", "target / self.std",
         "predict adds the mean, so the target must be without it"),
        ("- target[rows]", "+ target[rows]", "the sign of the target is wrong"),
        (".clamp(min=1e-6)", "", "equal rewards divide by 0"),
        ('"value batches", n)', '"value batches")', "every round has the same order"),
        ('"value batches", n)', '"value", n)', 'the order is that of the stream "value batches"'),
        ("self.optimizer.step()", "pass", "no step is taken")),
    "support.models.make_reference": (
        ("tuned.disable_adapters()", "pass",
         "the adapters stay on, so the reference is the tuned model"),
        ("tuned.enable_adapters()", "pass", "the adapters stay off afterwards"),
        ("copy.deepcopy(pipe.unet)", "pipe.unet",
         "the reference is the same network, so it is trained along"),
        ("pipe.unet = tuned", "pass", "the tuned model is not put back"),
        ("try:\n            yield\n        finally:", "yield\n        if True:",
         "after an error inside, the tuned model is not put back")),
    "04_dpok.accumulate": (
        ("mdp.kl_divergence(mean, reference_means[i, k], std)",
         "mdp.kl_divergence(mean.detach(), reference_means[i, k], std)",
         "the KL has lost its gradient"),
        ("mdp.kl_divergence(mean, reference_means[i, k], std)",
         "mdp.kl_divergence(mean, trajectory.means[i, k], std)",
         "the KL is to the reference, not to the policy that drew the pictures"),
        ("old_log_prob / D, kl / D", "old_log_prob / D, kl", "the KL is divided by D, too"),
        ("-J.sum() * T * share", "-J.sum() * share",
         "the steps of a picture are summed; this is their mean, T times too small"),
        ("-J.sum() * T * share", "J.sum() * T * share", "the loss is minus the objective"),
        ("config.alpha, config.beta)", "config.beta, config.alpha)", "α and β are swapped"),
        ("advantage[i, k], kl", "advantage[i, 0 * k], kl",
         "each step has an advantage of its own, by V at that step"),
        ("trajectory.latents[i, k + 1]", "trajectory.latents[i, k]",
         "the action is the next latent, k + 1; this scores the state itself")),
    "05_eval.best_of_n_kl": (
        ("math.log(n) - (n - 1) / n", "math.log(n)", "(n − 1)/n is taken off log n"),
        ("(n - 1) / n", "1 / n", "(n − 1)/n is taken off, not 1/n"),
        ("math.log(n) - (n - 1) / n", "(n - 1) / n - math.log(n)", "a KL is never below 0"),
        ("math.log(n)", "math.log2(n)", "nats are asked for: the natural logarithm")),
    "05_eval.best_of_n": (
        ("r[i] > best_r[i]", "best_r[i] == -math.inf or r[i] < best_r[i]",
         "the worst is kept, not the best"),
        ("r[i] > best_r[i]", "True", "the last is kept, not the best"),
        ("best_of_n_kl(k + 1)", "best_of_n_kl(k + 2)", "n is off by one"),
        ("if k + 1 in sizes", "if k + 2 in sizes", "n is off by one"),
        ("config, k).images", "config, 0).images", "every draw has the same noise"),
        ("list(best_images)", "best_images",
         "all n share one list, so later draws change what was kept for a smaller n"),
        ("best_r[i], best_images[i] = r[i], images[i]", "best_images[i] = images[i]",
         "the best reward so far is never updated"),
        (" | set(affordable)", "", "the n that the budgets pay for are not measured")),
    "05_eval.diversity_values": (
        ("(1 - f @ f.T).sum(1)", "(f @ f.T).sum(1)", "this is similarity; distance is 1 − cos"),
        ("(N * (N - 1))", "(N * N)",
         "a picture has no distance to itself: there are N·(N − 1) pairs"),
        ("total - 2 * own", "total - own", "a picture's distances are in the sum twice"),
        ("N * d - (N - 1) * d_without", "d_without", "the jackknife's value is N·d − (N−1)·d_{−i}"),
        ("f.double().norm(dim=1, keepdim=True)", "f.double().norm()",
         "each vector is divided by its own length")),
    "experiments.sft.rwr_weights": (
        ("/ temperature", "* temperature", "rewards are divided by the temperature τ"),
        (" * len(rows)", "", "the weights of a prompt have mean 1, not sum 1"),
        ("if prompts[i] == prompt", "if prompts", "each prompt's weights are its own"),
        ("reward[rows].double()", "-reward[rows].double()", "the worst pictures weigh most"),
        (".softmax(0)", ".exp()", "the weights are not normalized")),
    "experiments.sft.sparse_weights": (
        ("descending=True", "descending=False", "the worst are kept, not the best"),
        ("max(1, round(keep * len(rows)))", "round(keep * len(rows))",
         "at least one picture is kept"),
        ("len(rows) / n", "1.0", "the weights have mean 1: those that are kept weigh 1/share"),
        ("if prompts[i] == prompt", "if prompts", "each prompt keeps its own best"),
        ("rows[best]", "best", "places within a prompt are not places in the whole list")),
    "support.significance.resampled_deviations": (
        ("(len(own) / (len(own) - 1)) ** 0.5", "1.0",
         "n numbers vary too little about their own mean: widen by √(n/(n − 1))"),
        ("own - own.mean()", "own", "deviations are from the stratum's mean"),
        ("own - own.mean()", "own - values.double().mean()",
         "deviations are from the stratum's mean, not from that of all"),
        (".sum(1) / len(values)", ".mean(1)", "a stratum counts by its share of all values"),
        ("values[rows_of(strata, label)].double()", "values.double()",
         "values are drawn within their stratum")),
    "support.significance.hierarchical_bootstrap": (
        ("a.double() - b.double()", "b.double() - a.double()", "the difference is a − b"),
        ("share.sqrt() *", "1.0 *", "what seed and unit add together is counted twice"),
        ("deviation = resampled_deviations(units.mean(1), [0] * len(d), stream, draws)",
         "deviation = torch.zeros(draws).double()",
         "seeds vary, too: this resamples pictures only"),
        ("(1 - level) / 2, (1 + level) / 2", "1 - level, level",
         "an interval of 95 % leaves out 2.5 % on each side"),
        ("2 * (beyond + 1)", "(beyond + 1)", "p has two sides"),
        (" * (nu / torch.from_numpy(stream.chisquare(nu, draws))).sqrt()", "",
         "from few seeds the interval is Student's, wider than the normal one"),
        ("len(d) == 1", "len(d) == 0", "from one seed nothing can be told"),
        ("2 * (beyond + 1) / (draws + 1)", "2 * beyond / draws",
         "p is never 0 from a finite number of draws")),
    "support.significance.holm": (
        ("(len(p) - j) * p[i]", "len(p) * p[i]", "this is Bonferroni's: all p times m"),
        ("max(largest, min(1.0, (len(p) - j) * p[i]))", "min(1.0, (len(p) - j) * p[i])",
         "an adjusted p may not be smaller than that of a smaller p"),
        ("(len(p) - j)", "(j + 1)", "the smallest p gets the largest factor"),
        ("adjusted[i]", "adjusted[j]", "the results are in the order of the input"),
        ("min(1.0, (len(p) - j) * p[i])", "(len(p) - j) * p[i]", "a p is at most 1")),
    "experiments.early_stopping.stop_by_rule": (
        ("m = 1", "m = 0", "the pretrained model is always there to be kept"),
        ("rounds[:m]", "rounds[:m + 1]", "the round that crossed the bound counts for nothing"),
        ("in rounds[:m]]", "in rounds]", "what follows m counts for nothing"),
        ("max(g)", "min(g)", "the best labels are kept, not the worst"),
        ('row["labels_mean"]', 'row["gold"]', "the rule may not look at the truth"),
        ("<= bound", ">= bound", "training stops where the KL is above the bound")),
}
IS, RUNNING = "tests/runs/test_golden.py -k [is]", "tests/runs/test_golden.py -k [is_running]"
LORA, VALUE = "tests/runs/test_golden.py -k [is_lora]", "tests/runs/test_golden.py -k [dpok_value]"
EVAL = "tests/equations/test_05_eval.py"
LOOPS = {  # function -> (text in it, what stands there instead, what is wrong, tests that fail)
    "03_ddpo.train": (
        ('"train", n)', '"train", 0)', "every round has the same noise", IS),
        ("len(prompts), K, config.seed", "len(prompts), 1, config.seed",
         "a round has one update instead of K", LORA),
        ("A = A * scale", "A = A.expand(-1, len(scale))", "the step weights are not used", IS),
        ("weight_decay=config.weight_decay", "weight_decay=0", "--weight-decay is not used", IS),
        ("config.learning_rate, weight", "1e-4, weight", "--learning-rate is not used", IS),
        ("prompts, baseline, config", "prompts, {}, config",
         "the running statistics are forgotten after each round", RUNNING),
        ("after = evaluate(pipe, all_prompts, reward, config)", "after = before",
         "the model is not evaluated after training", IS)),
    "03_ddpo.evaluate": (
        ('"evaluate", 0', '"train", 0', "the evaluation is on noise that training drew", IS),),
    "04_dpok.train": (
        ("with reference():\n            reference_means", "if True:\n            reference_means",
         "the reference's means are those of the tuned model", VALUE),
        ("            baseline.fit(trajectory, r, n)", "            pass",
         "the value function is never fitted", VALUE),
        ("baseline.predict(trajectory), prompts)",
         "(baseline.fit(trajectory, r, n), baseline.predict(trajectory))[1], prompts)",
         "the value function has seen the rewards that it is subtracted from", VALUE),
        ("config.seed, n):", "config.seed, 0):", "every round has the same minibatches", VALUE)),
    "04_dpok.evaluate": (
        ("rewards.score(gold, trajectory", "rewards.score(reward, trajectory",
         "gold is the proxy", VALUE),
        ("with reference():\n        reference_means", "if True:\n        reference_means",
         "the path KL is to the tuned model itself", VALUE)),
    "support.training.optimizer_step": (
        ("optimizer.zero_grad()", "pass", "gradients of earlier updates stay", IS),
        ("clip_grad_norm_(params, config.max_grad_norm)", "clip_grad_norm_(params, 1.0)",
         "the norm bound of a mean acts on a sum: every update has the same length", IS),
        ("norm > config.max_grad_norm", "norm < config.max_grad_norm",
         "the log says the opposite of what was clipped", IS)),
    "support.training.step_pairs": (
        ("k += order[:kept].tolist()", "k += list(range(kept))",
         "always the same steps are trained on", RUNNING),
        ("max(1, round(config.timestep_fraction * steps))", "steps",
         "--timestep-fraction is not used", RUNNING)),
    "support.training.prompts_of_round": (
        ('"prompts", passes)', '"prompts")', "every pass has the same order of prompts",
         "tests/support/test_training.py"),),
    "support.training.batches": (
        ("yield i[rows], k[rows]", "yield i[rows], k[rows].flip(0)",
         "pictures and steps no longer belong together", RUNNING),),
    "05_eval.draw": (
        ('"compare", k', '"train", k', "the comparison is on noise that training drew",
         "tests/runs/test_eval.py -k each_sample"),),
    "05_eval.evaluate": (
        ("with reference():\n        reference_means", "if True:\n        reference_means",
         "the path KL is to the tuned model itself", "tests/runs/test_eval.py -k each_sample"),),
    "05_eval.plan": (
        ('("seen", "unseen")', '("unseen", "seen")', "seen and unseen prompts are swapped",
         "tests/runs/test_eval.py -k plan_has"),
        ("config.samples // 4", "config.samples // 2",
         "there are fewer than 4 pictures of a prompt", "tests/runs/test_eval.py -k plan_has")),
    "05_eval.difference": (
        ("hierarchical_bootstrap(x, y,", "hierarchical_bootstrap(y, x,",
         "the difference is b − a", EVAL),
        ("tables.values_of(by_model[b], metric, split)", "tables.values_of(by_model[a], metric, "
         "split)", "a model is compared with itself", EVAL),
        ('strata if split == "unseen" else None', "strata",
         "seen prompts are taken for a sample of prompts", EVAL)),
    "05_eval.claims": (
        ('significance.holm([row["p"] for row in found])', '[row["p"] for row in found]',
         "twelve claims are judged as if each were the only one", EVAL),),
    "experiments.sft.sft_objective": (
        ("imitation + beta * drift", "imitation - beta * drift",
         "drifting away is rewarded", "tests/equations/test_experiments.py"),),
    "experiments.sft.accumulate": (
        ("with torch.no_grad(), reference():", "with torch.no_grad():",
         "the pretrained prediction is the tuned model's", "tests/runs/test_experiments.py -k "
         "sft_is_its_plain"),
        ("weight[rows].to(x_0), eps_pre", "torch.ones(len(rows)).to(x_0), eps_pre",
         "the weights are not used", "tests/runs/test_experiments.py -k sft_is_its_plain"),
        ("len(rows) / M", "1 / M * len(all_rows)",
         "the gradient depends on how many batches it is worked in",
         "tests/runs/test_experiments.py -k sft_is_its_plain")),
    "experiments.sft.draw_pictures": (
        ("with reference():", "if True:", "the fixed set is drawn by the tuned model",
         "tests/runs/test_experiments.py -k sft_is_its_plain"),),
    "experiments.early_stopping.price": (
        ("labels * m", "labels", "labels are paid for each round", "tests/equations/"
         "test_early_stopping.py"),),
}


@dataclass(frozen=True)
class Mutant:
    function: str  # as in exercises.py
    old: str  # text that stands in it once
    new: str  # what stands there instead
    words: str  # what is wrong, for the student
    tests: str = ""  # arguments of pytest; without them, the exercise's own

    @property
    def file(self):
        return split(self.function)[0].replace(".", "/") + ".py"

    @property
    def chapter(self):
        exercise = BY_FUNCTION.get(self.function)
        return exercise.chapter if exercise else 0

    def right_text(self):
        source = (ROOT / self.file).read_text(encoding="utf-8")
        return cut.function_text(source, split(self.function)[1])

    def text(self):
        """The wrong function."""
        return self.planted(self.right_text())

    def planted(self, text):
        """The text with the mistake in it; ValueError unless it has exactly one place."""
        if text.count(self.old) != 1:
            raise ValueError(f"{self.function}: {text.count(self.old)} times {self.old!r}")
        return text.replace(self.old, self.new)


MUTANTS = [Mutant(function, *words) for table in (MISTAKES, LOOPS)
           for function, mistakes in table.items() for words in mistakes]


def survivors(mutants, jobs=2):
    """Those of the wrong answers that no test notices, with the reason.

    A test must fail: a crash, a time limit, or a `-k` that chooses no test prove nothing. And the
    same tests must pass with the right function.
    """
    grade = import_module("grade")  # which imports this file
    grade.load_everything()
    right = {(mutant.function, mutant.tests): mutant for mutant in mutants if mutant.tests}

    def is_wrong(mutant):
        passed, reason, failure = grade.grade_text(mutant.function, mutant.text(), 120,
                                                   mutant.tests)
        return passed or not failure, reason

    def is_right(mutant):
        passed, reason, _ = grade.grade_text(mutant.function, mutant.right_text(), 120,
                                             mutant.tests)
        return not passed, f"the right function fails: {reason}"

    with ThreadPoolExecutor(jobs) as pool:
        checks = [*zip(mutants, pool.map(is_wrong, mutants)),
                  *zip(right.values(), pool.map(is_right, right.values()))]
    return [(mutant, reason) for mutant, (alive, reason) in checks if alive]


def main(functions):
    unknown = set(functions) - {mutant.function for mutant in MUTANTS}
    if unknown:
        sys.exit(f"mutants.py: {unknown.pop()}: there is no wrong answer for this function")
    chosen = [mutant for mutant in MUTANTS if not functions or mutant.function in functions]
    alive = survivors(chosen)
    for mutant, reason in alive:
        print(f"no test notices: {mutant.function}: {mutant.old!r} -> {mutant.new!r} {reason}")
    print(f"{len(chosen)} wrong answers, {len(alive)} of them unnoticed")
    return len(alive)


if __name__ == "__main__":
    sys.exit(min(1, main(sys.argv[1:])))
