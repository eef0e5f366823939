# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 09 · FP8: reading eight-bit weights

# %% [markdown]
# ## Blocks of 128 × 128

# %%
#| export
def weight_dequant(q_oi, scale_zz, block: int = 128):
    """fp32 weight from codes and one scale a block: w_oi = q_oi · s[⌊o/128⌋, ⌊i/128⌋] (§3.3.2)."""
    o, i = q_oi.shape
    want = (-(-o // block), -(-i // block))
    if tuple(scale_zz.shape) != want:
        raise ValueError(f"a weight of {o}×{i} needs scales {want}, not {tuple(scale_zz.shape)}")
    rows = scale_zz.float().repeat_interleave(block, 0)[:o]
    return q_oi.float() * rows.repeat_interleave(block, 1)[:, :i]
