"""Where a run happens: Ray worker groups for training and actor pools for evaluation."""
