"""Post-training: SFT, reward models, GRPO; policies, rollouts and prompt sets."""
