"""The paper, one file a stage: pretrain, sft, reward_model, ppo. Stages meet only through model
folders.
"""
