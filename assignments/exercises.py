"""The exercises: functions of the five chapters that students write themselves.

One table for all: make.py blanks these functions out, with what the tests demand as a comment,
grade.py runs the tests that check them, and mutants.py knows wrong answers. An exercise's tests are
those with the marker `equation(label, function)`: `python -m pytest --equations` lists them.
"""
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"


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
        """"03_ddpo.train" -> "03_ddpo.py", "support.models.decode" -> "support/models.py"."""
        return split(self.function)[0].replace(".", "/") + ".py"

    @property
    def name(self):
        """The function in its file: "train", or "Value.fit" of a class."""
        return split(self.function)[1]


def split(dotted):
    """"03_ddpo.train" -> ("03_ddpo", "train"): the module, and the name in it."""
    words = dotted.split(".")
    depth = 2 if words[0] in ("support", "experiments") else 1
    return ".".join(words[:depth]), ".".join(words[depth:])


def files_of(function):
    """The files in tests/ which have the marker of this function."""
    return [file for file in sorted(TESTS.glob("*/test_*.py"))
            if f'"{function}"' in file.read_text(encoding="utf-8")]


EXERCISES = (
    Exercise("1.1", "01_mdp.forward_process", "the forward process", 1,
             "ᾱ_t is one number per picture: `column` gives it three more dimensions."),
    Exercise("1.2", "01_mdp.denoising_loss", "the denoising loss", 1,
             "Average over a picture's numbers first, weigh pictures, then average over them.",
             "AssertionError where weight has another shape than (B,)."),
    Exercise("1.3", "01_mdp.predict_noise", "classifier-free guidance", 2,
             "Where s is 1, one half is enough; else put the empty prompt and the prompt into one "
             "batch, and start from the empty prompt's prediction.",
             "The network is called once, as unet(x, t, encoder_hidden_states=c).sample, and has "
             "nothing else but unet.dtype: x and c are in it, and t has a number for each row. The "
             "empty prompt may come as one row: expand it."),
    Exercise("1.4", "01_mdp.ddim_coefficients", "the coefficients of a DDIM step", 3,
             "Look ᾱ_{t−1} up at the previous timestep, and at 0 where that is past the end.",
             "The time before t is t − num_train_timesteps // num_inference_steps, not the next "
             "entry of scheduler.timesteps."),
    Exercise("1.5", "01_mdp.step_mean_std", "the mean of a DDIM step", 2,
             "Take x̂_0 and ε from x0_and_noise, and the share of ε from toward_x_t.",
             "Coefficients are worked out in float64, and brought to x_t's dtype by `column`."),
    Exercise("1.6", "01_mdp.log_prob", "the log-probability of a step", 2,
             "Sum over all D numbers of a latent; each of them has its own log σ."),
    Exercise("1.7", "01_mdp.kl_divergence", "KL of two steps", 1,
             "Both Gaussians have the same σ, so only the distance of their means is left."),
    Exercise("1.8", "01_mdp.noise_weight", "how strongly a step reacts to ε", 2,
             "Put x0_and_noise's results into the mean of 1.5: what multiplies the prediction?"),
    Exercise("1.9", "01_mdp.rollout", "the rollout", 4,
             "Keep what you scored: latent k + 1 is the action whose log-prob is number k.",
             "training.mine(B) are the pictures to draw, config.batch_size at a time; "
             "training.gaussians(rows, (T + 1, C, H, W), config.seed, purpose, n) is their noise: "
             "entry 0 is x_T, entry k + 1 the z of step k. First models.set_timesteps."),
    Exercise("2.1", "02_rewards.jpeg_kilobytes", "the JPEG reward", 1,
             "Save the picture into memory and ask how long the file is; a kB has 1000 bytes.",
             "Pictures with transparency come, too, and JPEG has none."),
    Exercise("2.2", "02_rewards.bertscore_recall", "BERTScore recall", 2,
             "Each word of the reference looks for its nearest word in the candidate."),
    Exercise("2.3", "02_rewards.ranks", "ranks with ties", 2,
             "Equal values share the mean of the places that they take.",
             "The result is float64."),
    Exercise("2.4", "experiments.make_rewards.bradley_terry_loss", "the Bradley–Terry loss", 1,
             "−log σ(better − worse), in a form that does not overflow."),
    Exercise("3.1", "03_ddpo.mean_of_others", "the mean of the others", 2,
             "Others are pictures of the same prompt, and never the picture itself."),
    Exercise("3.2", "03_ddpo.leave_one_out_advantage", "the leave-one-out advantage", 2,
             "`spread` is one number for the whole round; equal rewards must not divide by 0.",
             "Rewards may be whole numbers. A small number is never added to the spread."),
    Exercise("3.3", "03_ddpo.running_advantage", "the running advantage", 2,
             "First add this round's rewards to the history, then look at it.",
             "Only a prompt's last `keep` rewards stay in `history`, the oldest first. Rewards may "
             "be whole numbers. A small number is never added to the spread."),
    Exercise("3.4", "03_ddpo.step_weights", "step weights", 2,
             "Divide by their mean, so that the learning rate keeps its meaning.",
             "First models.set_timesteps(pipe.scheduler, config.num_steps). The result: float32."),
    Exercise("3.5", "03_ddpo.step_pairs", "pairs of pictures and steps", 2,
             "All steps of the first picture, then those of the second: two long lists of indices.",
             "Of T steps round(timestep_fraction·T) are kept, at least one: the first columns of "
             'training.permutations(pictures, T, config.seed, "timesteps", n).'),
    Exercise("3.6", "03_ddpo.ddpo_sf_objective", "the score-function objective", 1,
             "Its gradient is the estimator: what multiplies ∇ log p?"),
    Exercise("3.7", "03_ddpo.reinforce", "REINFORCE", 4,
             "Draw, score, advantage; log-prob, objective and backward of all pairs; one step.",
             "First check, get_prompts, get_reward, load_pipeline, trainable, adamw, and "
             'runs.Run(config, "ddpo_sf", look), where look() evaluates. A round n of '
             'run.rounds(pipe, optimizer, baseline): prompts_of_round, rollout for "train", score, '
             "advantages times step weights; of training.batches the loss −ΣJ·T/(number of pairs); "
             "total_gradients, clip_grad_norm_, step; run.log(n, reward=r, grad_norm=...). At last "
             "return run, run.finish(pipe)."),
    Exercise("3.8", "03_ddpo.ddpo_is_objective", "the importance-sampled objective", 2,
             "The ratio of two probabilities is the exponential of a difference of logs; min "
             "keeps the sides that pull a ratio back."),
    Exercise("3.9", "03_ddpo.train", "DDPO's loop", 4,
             "REINFORCE's, with K parts of the pictures, and a step after each part.",
             'training.permutation(B, seed, "minibatches", n).tensor_split(K) are the parts. Pairs '
             "with |A| ≤ 1e-9 are counted, and left out. Both log-probs are divided by ratio_root. "
             "rollout and evaluate draw by the policy that is passed. "
             "run.note(kl_old=T·KL(old mean, mean), clip_fraction=|w − 1| > ε) of each batch."),
    Exercise("3.10", "experiments.flow.flow_time", "a diffusion model in flow time", 2,
             "Divide x_t = √ᾱ·x_0 + √(1−ᾱ)·ε by a number that makes its two shares add up to 1."),
    Exercise("3.11", "experiments.flow.sde_step", "Flow-GRPO's step", 2,
             "Get ε̂ from x̃ and v first; dt is negative: take the root of −dt.",
             "Everything may be a tensor of 0 dimensions. Where g is 0, so is the std."),
    Exercise("3.12", "experiments.flow.flow_kl", "the KL of two flow models", 2,
             "In the mean of 3.11 ε̂ changes with v, too: by what factor does the whole mean?"),
    Exercise("4.1", "04_dpok.dpok_objective", "DPOK's objective", 2,
             "Chapter 3's surrogate times α, less β times the KL."),
    Exercise("4.2", "04_dpok.step_means", "the means of the present policy", 2,
             "All (picture, step) pairs, a batch at a time; each result to its own place.",
             "training.mine(B) are the pictures of this process, config.batch_size at a time; the "
             "places of others' pictures stay 0."),
    Exercise("4.3", "04_dpok.path_kl", "the KL of each step", 2,
             "Each step has its own σ; the means of the policy that drew the pictures are stored."),
    Exercise("4.4", "04_dpok.Value.fit", "fitting the value function", 3,
             "Every step of a picture has that picture's final reward as its target.",
             "Without config.value it does nothing. self.rounds: the latest value_rounds rounds; "
             "self.mean and self.std (at least 1e-6) are of their rewards; self(x_t, c, t) is V, "
             "and its error (V − r)/self.std. Row j of training.permutation(len(r)·T, seed, "
             '"value batches", n) is step j % T of picture j // T; batch_size rows are a step on '
             "their mean squared error."),
    Exercise("4.5", "04_dpok.value_advantage", "the advantage over a value function", 1,
             "The difference has a value for each step, and so have the others' means."),
    Exercise("4.6", "support.models.make_reference", "the reference model", 2,
             "Adapters off and on again, also when something fails in between; without adapters, "
             "a frozen copy.",
             "`frozen`, where it is given, is the reference. With adapters nothing is copied, and "
             "a copy has no gradients."),
    Exercise("4.7", "04_dpok.train", "DPOK's loop", 4,
             "Chapter 3's, with the reference's means, the KL and the value function.",
             "No pair is left out. The KL, too, is divided by ratio_root. Step weights are on the "
             "advantage. After a round's updates baseline.fit(trajectory, r, n), then run.log with "
             "gold=..., kl=... of each picture."),
    Exercise("5.1", "05_eval.interval", "an interval over seeds", 2,
             "The mean of the differences divided by its error has a t-distribution.",
             "d is an array; scipy.stats is there as `stats`. Keys: mean, low, high, p. s² has the "
             "factor 1/(S − 1)."),
    Exercise("5.2", "05_eval.holm", "Holm's correction", 2,
             "The smallest p is multiplied by m, the next by m − 1; none may fall below one "
             "before it.",
             "p is a list of numbers, the result an array."),
    Exercise("5.3", "support.measures.diversity", "diversity", 1,
             "A picture's distance to itself is 0, so sum over all and divide by N − 1."),
    Exercise("5.4", "05_eval.best_of_n_kl", "the KL of best of n", 1,
             "Integrate log(n·u^(n−1)) over the density n·u^(n−1) of the largest of n."),
    Exercise("5.5", "05_eval.best_of_n_weights", "best of n", 3,
             "All n draws are up to r with probability F(r)ⁿ; the best is r itself with what that "
             "grows by at r.",
             "The pool's own pictures are what is drawn, so F counts them. The weights are in the "
             "order of r, float64, and have mean 1."),
    Exercise("5.6", "experiments.sft.rwr_weights", "reward-weighted regression's weights", 2,
             "A softmax within each prompt, so that its weights have mean 1."),
    Exercise("5.7", "experiments.sft.sparse_weights", "sparse weights", 2,
             "Each prompt keeps its own best share, at least one picture.",
             "A prompt of n pictures keeps round(keep·n); of equal rewards the earlier."),
)
BY_FUNCTION = {exercise.function: exercise for exercise in EXERCISES}
BY_NUMBER = {exercise.number: exercise for exercise in EXERCISES}
