"""What chapter 5 measures: rewards and distances of pictures, and what a training has cost."""
import torch

from support import models
from support import reward_models as nets


class Measures:
    """Rewards by column, and CLIP; each is loaded once.

    rewards: chapter 2, whose get_reward and score are used. diversity: a function of the embeddings
    (N,D) of one prompt's pictures, with a number for each.
    """

    def __init__(self, config, rewards, diversity):
        self.chapter, self.diversity = rewards, diversity
        self.rewards = {"reward": rewards.get_reward(config.reward, config),
                        "gold": rewards.get_reward(config.gold, config, flag="--gold")}
        for name in config.others:
            self.rewards[name] = rewards.get_reward(name, config, flag="--others")
        self.clip = nets.load_clip(config.clip).to(models.pick_device(config.device))

    def score(self, column, images, prompts):
        """One reward's numbers.  -> (B,)"""
        return self.chapter.score(self.rewards[column], images, prompts)

    def rows(self, requests, images, kl):
        """A dict for each picture: its place, its request, all that is measured, to four decimals.

        Rounded here, so that whoever has the CSV file has the very numbers of the verdicts.
        """
        prompts = [request["prompt"] for request in requests]
        columns = {name: self.score(name, images, prompts) for name in self.rewards}
        f = self.embed(images)
        columns |= {"path_kl": kl, "diversity": torch.zeros(len(images))}
        for prompt in set(prompts):
            same = torch.tensor([other == prompt for other in prompts])
            columns["diversity"][same] = self.diversity(f[same])
        rows = []
        for i, request in enumerate(requests):
            numbers = {name: round(float(values[i]), 4) for name, values in columns.items()}
            rows.append({"picture": i} | request | numbers)
        return rows

    @torch.no_grad()
    def embed(self, images, batch_size=64):
        """CLIP's embedding of each picture.  -> (B,D)"""
        size, embeddings = self.clip.config.vision_config.image_size, []
        for i in range(0, len(images), batch_size):
            pixels = nets.clip_pixels(images[i:i + batch_size], size, self.clip.device)
            f = self.clip.get_image_features(pixel_values=pixels).pooler_output
            embeddings.append(f.cpu())
        return torch.cat(embeddings)


def price(config):
    """N = B·T·g·(1 + 3·share + [β > 0]) a round: a forward pass counts 1, a backward pass 2.

    config: a run's config.json -> its reward queries and UNet evaluations. B pictures of T steps
    are drawn; RL learns from a share of them; g = 2 with guidance. Supervised learning has no
    guidance, and K updates of ⌊B·T/K⌋ noisy pictures. What is only looked at is free.
    """
    B = config["prompts_per_round"] * config["samples_per_prompt"]
    T = config["num_steps"]
    g = 1 if config["guidance_scale"] == 1 else 2
    has_kl = config.get("beta", 0) > 0
    if config["method"].startswith("sft"):
        K = config["updates_per_round"]
        N = B * T * g + K * max(1, B * T // K) * (3 + has_kl)
    else:
        steps = max(1, round(config["timestep_fraction"] * T))
        N = B * g * (T + 3 * steps + has_kl * T)
    return config["rounds"] * B, config["rounds"] * N
