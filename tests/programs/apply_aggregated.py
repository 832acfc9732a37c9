"""Two replicas apply gradients. Prints how far the variable has moved after each step."""

import tensorflow as tf

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)

from keras import Variable, optimizers  # noqa: E402

from keras_avg import SWA  # noqa: E402

strategy = tf.distribute.MirroredStrategy(["cpu:0", "cpu:1"])
with strategy.scope():
    variable = Variable([0.0])
    optimizer = SWA(optimizers.SGD(1.0), 0, 1)
    optimizer.build([variable])


@tf.function
def step(aggregate):
    def on_replica():
        replica = tf.distribute.get_replica_context()
        grad = tf.cast([2 * replica.replica_id_in_sync_group + 1], "float32")  # 1 and 3
        if not aggregate:
            grad = replica.all_reduce("sum", grad)
        optimizer.apply_gradients([(grad, variable)], experimental_aggregate_gradients=aggregate)

    strategy.run(on_replica)


for aggregate in (True, False):
    step(aggregate)
    print(-variable.numpy()[0])
