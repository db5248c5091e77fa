"""Side by side: the same prompts on the same checkpoint through Steeple and through the engines that people use."""
