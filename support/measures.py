"""What chapter 5 measures: rewards and distances of pictures, and what a training has cost."""
import torch

from support import models
from support import reward_models as nets
from support.training import mean_se


class Measures:
    """Rewards by column, and CLIP; each is loaded once.

    rewards: chapter 2, whose get_reward and score are used.
    """

    def __init__(self, config, rewards):
        self.chapter = rewards
        self.rewards = {"reward": rewards.get_reward(config.reward, config),
                        "gold": rewards.get_reward(config.gold, config, flag="--gold")}
        for name in config.others:
            self.rewards[name] = rewards.get_reward(name, config, flag="--others")
        self.clip = nets.load_clip(config.clip).to(models.pick_device(config.device))

    def rewards_of(self, images, prompts):
        """All rewards.  -> {column: (B,)}"""
        return {name: self.chapter.score(reward, images, prompts)
                for name, reward in self.rewards.items()}

    def columns(self, images, prompts, kl):
        """All that is measured of each picture.  -> {column: (B,)}"""
        f = self.embed(images)
        apart = torch.zeros(len(images))
        for prompt in set(prompts):
            same = torch.tensor([other == prompt for other in prompts])
            apart[same] = diversity(f[same])
        return self.rewards_of(images, prompts) | {"diversity": apart, "kl": kl}

    @torch.no_grad()
    def embed(self, images, batch_size=64):
        """CLIP's embedding of each picture.  -> (B,D)"""
        size, embeddings = self.clip.config.vision_config.image_size, []
        for i in range(0, len(images), batch_size):
            pixels = nets.clip_pixels(images[i:i + batch_size], size, self.clip.device)
            f = self.clip.get_image_features(pixel_values=pixels).pooler_output
            embeddings.append(f.cpu())
        return torch.cat(embeddings)


def means(columns, w=1):
    """m = mean(w·v) of each column and its error s(w·(v − m))/√N; w: weights of mean 1.

    The weights count as known: where they come from the same pictures, the error is too small.
    """
    row = {}
    for name, values in columns.items():
        m = (w * values.double()).mean()
        _, row[name + "_se"] = mean_se(w * (values - m))
        row[name] = m.item()
    return row


def diversity(f):
    """d_i = mean_{j≠i} (1 − cos(f_i, f_j)),  f CLIP's embeddings of one prompt's pictures.

    (N,D) -> (N,). Their mean is the diversity: the mean distance of two pictures.
    """
    N = len(f)
    f = f / f.norm(dim=1, keepdim=True)
    distance = 1 - f @ f.T  # of a picture to itself: 0
    return distance.sum(1) / (N - 1)


def price(config):
    """N = B·T·g·(1 + 3·share + [β > 0]) a round: a forward pass counts 1, a backward pass 2.

    config: a run's config.json -> its reward queries and UNet evaluations. B pictures of T steps
    are drawn; RL learns from a share of them; g = 2 with guidance. Supervised learning has no
    guidance, and `passes` times K updates of ⌊B·T/K⌋ noisy pictures, of which sparse weights leave
    a share (without a KL term). What is only looked at is free.
    """
    B = config["prompts_per_round"] * config["samples_per_prompt"]
    T = config["num_steps"]
    g = 1 if config["guidance_scale"] == 1 else 2
    has_kl = config.get("beta", 0) > 0
    if config["method"].startswith("sft"):
        K = config["updates_per_round"]
        is_sparse = config["weights"] == "sparse" and not has_kl
        share = config["keep"] if is_sparse else 1
        N = B * T * g + config["passes"] * K * max(1, B * T // K) * share * (3 + has_kl)
    else:
        steps = max(1, round(config["timestep_fraction"] * T))
        N = B * g * (T + 3 * steps + has_kl * T)
    return config["rounds"] * B, round(config["rounds"] * N)
