"""The keys ``slurm.*`` of ``aligndistil launch slurm``: what a job asks Slurm for, and how it starts on the nodes.

The dataclasses are not frozen, since OmegaConf must be able to merge overrides into them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_aligndistil.config.optional import OptionalInt, OptionalStr


@dataclass(kw_only=True)
class SlurmConfig:
    """``slurm``; a key that is null isn't passed to Slurm, which then decides."""

    nodes: OptionalInt = None  # default: the run's trainer.num_nodes
    gpus_per_node: OptionalInt = None  # 0: ranks on CPUs; default: trainer.devices, 0 with trainer.accelerator=cpu
    partition: OptionalStr = None
    account: OptionalStr = None
    qos: OptionalStr = None
    time: OptionalStr = None  # HH:MM:SS or D-HH:MM:SS; in a YAML file in quotes
    job_name: OptionalStr = None  # default: the run's exp_manager.name
    cpus_per_task: OptionalInt = None  # cores of a node; default: 4 a GPU, 1 a rank on CPUs, with exclusive all
    mem: OptionalStr = None  # of a node, such as 200G; 0: all, which is the default with exclusive
    exclusive: bool = False  # whole nodes
    requeue: bool = True  # after a preemption or a time limit, and by Slurm after a lost node
    signal_seconds: int = 300  # before the time limit the run is told to save and stop; Slurm may do it 60 s earlier
    container_image: OptionalStr = None
    container_runtime: OptionalStr = None  # pyxis | apptainer; default: apptainer for *.sif and URIs, else pyxis
    container_mounts: list[str] = field(default_factory=list)  # source:target[:options]; the current folder always is
    setup: list[str] = field(default_factory=list)  # shell lines before the run: modules, a virtual environment
    environment: dict[str, str] = field(default_factory=dict)  # exported after our own variables, so that these win
    python: OptionalStr = None  # on the nodes; default: this interpreter, python3 in a container
    log_dir: OptionalStr = None  # batch files and logs; default: <log dir of the run>/slurm
    dependency: OptionalStr = None  # sbatch --dependency; of a chain its first job's
    extra: list[str] = field(default_factory=list)  # further options of sbatch, such as --constraint=h100


@dataclass(kw_only=True)
class SlurmLaunchConfig:
    """What a YAML file of slurm settings may hold."""

    slurm: SlurmConfig = field(default_factory=SlurmConfig)
