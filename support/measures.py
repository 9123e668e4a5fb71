"""All that chapter 5 measures of pictures: rewards, what is said of them, CLIP's embedding."""
import torch

from support import models
from support import reward_models as nets


class Measures:
    """Rewards by column, a describer and CLIP, each loaded once.

    rewards: chapter 2, whose get_reward, score and QUESTION are used; diversity: a function of one
    prompt's embeddings, (N,D) -> (N,).
    """

    def __init__(self, config, rewards, diversity):
        device = models.pick_device(config.device)
        self.chapter, self.diversity, self.out = rewards, diversity, config.out
        self.rewards = {"reward": rewards.get_reward(config.reward, config, device),
                        "gold": rewards.get_reward(config.gold, config, device, "--gold")}
        for name in config.others:
            self.rewards[name] = rewards.get_reward(name, config, device, "--others")
        self.ask = nets.load_vlm(config.vlm, device)
        self.clip = nets.load_clip(config.clip).to(device)

    @torch.no_grad()
    def rows(self, requests, images, kl):
        """A dict a picture: what was asked, its place, path KL, rewards, words, diversity."""
        prompts = [row["prompt"] for row in requests]
        columns = {"picture": range(len(images)), "path_kl": kl}
        for name, reward in self.rewards.items():
            columns[name] = self.chapter.score(reward, images, prompts, self.out).tolist()
        columns["description"] = self.describe(images)
        f = self.embed(images)
        columns["diversity"] = [0.0] * len(images)
        for prompt in dict.fromkeys(prompts):
            places = [i for i, other in enumerate(prompts) if other == prompt]
            for i, value in zip(places, self.diversity(f[places]).tolist()):
                columns["diversity"][i] = value
        rows = []
        for i, row in enumerate(requests):
            rows.append(dict(row) | {name: values[i] for name, values in columns.items()})
        return rows

    def describe(self, images, batch_size=32):
        words = []
        for i in range(0, len(images), batch_size):
            part = images[i:i + batch_size]
            words += self.ask(part, [self.chapter.QUESTION] * len(part))
        return words

    def embed(self, images, batch_size=64):
        size, embeddings = self.clip.config.vision_config.image_size, []
        for i in range(0, len(images), batch_size):
            pixels = nets.clip_pixels(images[i:i + batch_size], size, self.clip.device)
            f = self.clip.get_image_features(pixel_values=pixels).pooler_output
            embeddings.append(f.cpu())
        return torch.cat(embeddings)
