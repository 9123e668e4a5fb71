"""The exercises: functions of the five chapters that students write themselves.

One table for all: make.py blanks these functions out, with what the tests demand as a comment,
grade.py runs the tests that check them, and mutants.py knows wrong answers. An exercise's tests are
those in tests/ with the marker `equation(label, function)` of its function; `python -m pytest
--equations` lists them.
"""
from dataclasses import dataclass


@dataclass(frozen=True)
class Exercise:
    number: str  # chapter and place in it
    function: str  # module and name in it, as the tests' marker has it
    title: str
    points: int
    hint: str  # one sentence that students may read
    demand: str = ""  # what the tests look for and the docstring does not say

    @property
    def chapter(self):
        return int(self.number.partition(".")[0])

    @property
    def file(self):
        """"03_ddpo.accumulate" -> "03_ddpo.py", "support.models.decode" -> "support/models.py"."""
        return split(self.function)[0].replace(".", "/") + ".py"

    @property
    def name(self):
        """The function in its file: "accumulate", or "Value.fit" of a class."""
        return split(self.function)[1]


def split(dotted):
    """"03_ddpo.accumulate" -> ("03_ddpo", "accumulate"): the module, and the name in it."""
    words = dotted.split(".")
    depth = 2 if words[0] in ("support", "experiments") else 1
    return ".".join(words[:depth]), ".".join(words[depth:])


EXERCISES = (
    Exercise("1.1", "01_mdp.forward_process", "the forward process", 1,
             "ᾱ_t is one number per picture: give it three more dimensions before you multiply."),
    Exercise("1.2", "01_mdp.denoising_loss", "the denoising loss", 1,
             "Average over a picture's numbers first, weigh pictures, then average over them.",
             "AssertionError where weight has another shape than (B,)."),
    Exercise("1.3", "01_mdp.predict_noise", "classifier-free guidance", 2,
             "Where s is 1, one half is enough; else put the empty prompt and the prompt into one "
             "batch, and start from the empty prompt's prediction.",
             "The network gets a t for each of its rows, and x_t and prompts in its own dtype; "
             "what comes back is in float32 or better. The empty prompt may come as one row: "
             "expand it."),
    Exercise("1.4", "01_mdp.ddim_coefficients", "the coefficients of a DDIM step", 3,
             "Ask whether t − 1 is past the end of the schedule before you look it up; the last "
             "step uses final_alpha_cumprod.",
             "The time before t is t − num_train_timesteps // num_inference_steps, not the next "
             "entry of scheduler.timesteps. models.alphas_cumprod(scheduler, t) is the table of "
             "ᾱ in float64."),
    Exercise("1.5", "01_mdp.step_mean_std", "the mean of a DDIM step", 2,
             "Work in float64, from x̂_0 and ε of x0_and_noise; keep a root's argument at 0 or "
             "above."),
    Exercise("1.6", "01_mdp.log_prob", "the log-probability of a step", 2,
             "Sum over all D numbers of a latent; a row without noise counts 0."),
    Exercise("1.7", "01_mdp.kl_divergence", "KL of two steps", 1,
             "Both Gaussians have the same σ, so only the distance of their means is left."),
    Exercise("1.8", "01_mdp.noise_weight", "how strongly a step reacts to ε", 2,
             "The mean is linear in ε: look at it for ε = 1 and x = 0.",
             "ValueError with clip_sample in its text where scheduler.config.clip_sample is "
             "set, for then the mean is not linear."),
    Exercise("1.9", "01_mdp.rollout", "the rollout", 4,
             "Keep what you scored: latent k + 1 is the action whose log-prob is number k.",
             "training.gaussian((T + 1, C, H, W), *noise, i) is picture i's noise: entry 0 is "
             "x_T, entry k + 1 the z of step k. parallel.share(B, config.batch_size) gives the "
             "rows of each batch, and parallel.total adds up what processes have drawn. "
             "ValueError with --prompts in its text where there is none, and with --eta unless "
             "0 < η ≤ 1. latents and means are kept on the CPU."),
    Exercise("2.1", "02_rewards.jpeg_kilobytes", "the JPEG reward", 1,
             "Save the picture into memory and ask how long the file is; a kB has 1000 bytes.",
             "Pictures with transparency come, too, and JPEG has none."),
    Exercise("2.2", "02_rewards.bertscore_recall", "BERTScore recall", 2,
             "Each word of the reference looks for its nearest word in the candidate."),
    Exercise("2.3", "02_rewards.ranks", "ranks with ties", 2,
             "Equal values share the mean of the places that they take."),
    Exercise("2.4", "experiments.make_rewards.bradley_terry_loss", "the Bradley–Terry loss", 1,
             "−log σ(better − worse), in a form that does not overflow."),
    Exercise("3.1", "03_ddpo.ddpo_sf_objective", "the score-function objective", 1,
             "Its gradient is the estimator: what multiplies ∇ log p?"),
    Exercise("3.2", "03_ddpo.ddpo_is_objective", "the importance-sampled objective", 2,
             "The ratio of two probabilities is the exponential of a difference of logs; min "
             "keeps the sides that pull a ratio back."),
    Exercise("3.3", "03_ddpo.step_weights", "step weights", 2,
             "Divide by their mean, so that the learning rate keeps its meaning.",
             "First set the scheduler to config.num_steps. The result is float32, and all 1 "
             'where config.step_weight is "none".'),
    Exercise("3.4", "03_ddpo.mean_of_others", "the mean of the others", 2,
             "Others are pictures of the same prompt, and never the picture itself.",
             "ValueError with --samples-per-prompt in its text for a picture without others."),
    Exercise("3.5", "03_ddpo.leave_one_out_advantage", "the leave-one-out advantage", 2,
             "The spread is one number for the whole round; equal rewards must not divide by 0.",
             "The std divides by B; rewards may be whole numbers. Where the std is not above "
             "1e-6 divide by 1, and never add a small number to it."),
    Exercise("3.6", "03_ddpo.running_advantage", "the running advantage", 2,
             "First add this round's rewards to the history, then look at it.",
             "The std divides by the number of rewards. Where it is not above 1e-6 divide by 1, "
             "and never add a small number to it."),
    Exercise("3.7", "support.training.minibatches", "minibatches of pictures", 1,
             "All pictures once, in an order that random_stream draws, in as many parts as there "
             "are updates.",
             'The order is that of random_stream(seed, "minibatches", n).permutation; parts are '
             "as equal as torch's tensor_split makes them."),
    Exercise("3.8", "03_ddpo.accumulate", "the gradient of an update", 4,
             "A mean over pictures and a sum over steps; whatever batches they are worked in.",
             "training.step_pairs(pictures, T, config, n) are all pairs, training.batches(i, k, "
             "config.train_batch_size) their batches. Leave out pairs with |A| ≤ 1e-9, but "
             "divide J by the number of all pairs. Where the loss of a batch has no slope "
             "anywhere, as all its ratios are clipped flat, do not go back through the UNet. "
             'ratio "per_dim" divides both log-probs by D, for both estimators. Statistics are '
             "means over the pairs that were not left out (kl_old times T), 0 without any, and "
             "parallel.total_of(stats) is returned."),
    Exercise("4.1", "04_dpok.dpok_objective", "DPOK's objective", 2,
             "Chapter 3's surrogate times α, less β times the KL."),
    Exercise("4.2", "04_dpok.step_means", "the means of the present policy", 2,
             "All (picture, step) pairs, a batch at a time; each result to its own place.",
             "Batches have config.batch_size pairs. parallel.total(means) adds up what "
             "processes have worked out."),
    Exercise("4.3", "04_dpok.path_kl", "the KL of each step", 2,
             "Each step has its own σ; the means of the policy that drew the pictures are stored."),
    Exercise("4.4", "04_dpok.value_advantage", "the advantage over a value function", 1,
             "The difference has a value for each step, and so have the others' means."),
    Exercise("4.5", "04_dpok.Value.fit", "fitting the value function", 3,
             "Every step of a picture has that picture's final reward as its target.",
             "Keep the latest config.value_rounds rounds. self.mean and self.std (at least "
             "1e-6) are those of all targets kept, and the network learns (r − mean)/std. "
             'training.random_stream(seed, "value batches", n).permutation is the order; each '
             "batch_size rows of it are a step on their mean squared error."),
    Exercise("4.6", "support.models.make_reference", "the reference model", 2,
             "Adapters off and on again, also when something fails in between; without adapters, "
             "a frozen copy.",
             "`frozen`, where it is given, is the reference."),
    Exercise("4.7", "04_dpok.accumulate", "the gradient of an update with its KL", 3,
             "Chapter 3's, with the exact KL to the reference, whose gradient counts.",
             'Statistics are those of 3.8, but over all pairs: none is left out. ratio "per_dim" '
             "divides the KL by D, too."),
    Exercise("5.1", "05_eval.best_of_n_kl", "the KL of best of n", 1,
             "Integrate log(n·u^(n−1)) over the density n·u^(n−1) of the largest of n."),
    Exercise("5.2", "05_eval.best_of_n", "best of n", 3,
             "Keep the best so far of each request, and measure where n is one of the sizes.",
             "Sizes are all powers of 2, and those in `affordable`. Of equal rewards the "
             'earlier picture stays. measures.rewards["reward"] is what chooses, by '
             "rewards.score, and measures.rows(requests, images, kl) measures."),
    Exercise("5.3", "05_eval.diversity_values", "diversity and its error", 2,
             "Leaving a picture out takes its distances away twice: from i to j and from j to i.",
             "NaN for fewer than 3 pictures."),
    Exercise("5.4", "experiments.sft.rwr_weights", "reward-weighted regression's weights", 2,
             "A softmax within each prompt, so that its weights have mean 1."),
    Exercise("5.5", "experiments.sft.sparse_weights", "sparse weights", 2,
             "Each prompt keeps its own best share, at least one picture.",
             "A prompt of n pictures keeps round(keep·n); of equal rewards the earlier."),
    Exercise("5.6", "support.significance.resampled_deviations", "resampling", 2,
             "Draw with replacement within a stratum, and widen by √(n/(n − 1)).",
             "For each label in turn, as they first appear: rows_of(strata, label) are its n_h "
             "rows, and stream.integers(n_h, size=(draws, n_h)) those that are drawn."),
    Exercise("5.7", "support.significance.hierarchical_bootstrap", "a bootstrap over seeds", 3,
             "Subtract models of the same seed and noise first; then seeds and units both vary.",
             "One seed: −∞, ∞ and p = 1. The functions above this one give strata, variances, "
             'share and ν (1 where it is NaN). stream = random_stream(seed, "bootstrap") draws '
             "for the seeds, which are one stratum, then for the units, then chisquare(ν, "
             "draws). p = 2·(b + 1)/(draws + 1), at most 1, where b is the smaller count of d̄* "
             "≤ 0 and d̄* ≥ 0."),
    Exercise("5.8", "support.significance.holm", "Holm's correction", 2,
             "The smallest p is multiplied by m, the next by m − 1; none may fall below one "
             "before it."),
    Exercise("5.9", "experiments.early_stopping.stop_by_rule", "early stopping", 2,
             "Nothing that comes after the bound was crossed counts.",
             'The KL of a round is its "path_kl", and g its "labels_mean".'),
)
BY_FUNCTION = {exercise.function: exercise for exercise in EXERCISES}
BY_NUMBER = {exercise.number: exercise for exercise in EXERCISES}
