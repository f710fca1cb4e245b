"""Types of keys that may be null. OmegaConf resolves annotations at run time and does not understand ``X | None``."""

from typing import Optional

OptionalInt = Optional[int]
OptionalStr = Optional[str]
OptionalBool = Optional[bool]
OptionalFloat = Optional[float]
