"""fourfold beside others: who they are, how they are set up and asked, and how what they answer is shown."""
