"""InstructGPT in JAX: pretraining, fine-tuning, reward modelling and PPO.

The package imports nothing here. Import the room you need, for example
`from instruct_jax.losses import ranking_loss`.
"""

__version__ = "0.1.0"
