"""Responses of the policy under training: the engines that draw them, and the weights that they draw with."""
