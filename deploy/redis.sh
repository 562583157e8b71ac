#!/bin/sh
# Redis with two users, who may touch the queue's keys and nothing else; nobody comes in without a password.
# The rights are those of registry/stores/celery_bell.py. Nothing is kept on disk: a message is a hint, the job is a row.
set -eu
umask 077
users="${REDIS_USERS_FILE:-/run/redis/users.acl}"
rights='~adapterctl:* resetchannels -@all +auth +hello +ping +select +multi +exec +watch +unwatch +evalsha +script|load +llen +lpush +rpush +brpop +rpop +lrange +get +set +del +pexpire +expire +exists +time +type +sadd +srem +smembers +sismember +zadd +zrem +zrange +zrangebyscore +zrevrangebyscore +zscore +hset +hget +hdel +hexists +hlen'
{
    echo "user default off"
    echo "user server on >$BROKER_SERVER_PASSWORD $rights"
    echo "user worker on >$BROKER_WORKER_PASSWORD $rights"
} > "$users"
exec redis-server --aclfile "$users" --save '' --appendonly no --dir /tmp "$@"
