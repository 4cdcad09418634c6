"""The engine on NATS JetStream: a log in a stream that a cluster of servers replicates. Needs `eventfold[nats]`.

    async with EventLog.open("nats://host1:4222,host2:4222/orders") as log: ...
    engine = JetStream(["nats://host1:4222"], log="orders", replicas=3, user_credentials="app.creds")
    async with EventLog.open(engine) as log: ...

Any number of processes and hosts may write. Once `append` returns, the servers have acknowledged the event. With
`sync_interval: always` in their configuration, it is then on the disks of a majority of the replicas; without that
setting, it may only be in their memory. A client can't see the setting, so the operator of the servers must check it.
"""

from ._engine import JetStream

__all__ = ["JetStream"]

JetStream.__module__ = "eventfold.jetstream"
