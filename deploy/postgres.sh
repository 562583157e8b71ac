#!/bin/sh
# The two databases, each with an owner of its own; run once, when PostgreSQL makes its data folder.
set -eu
psql --no-psqlrc --set ON_ERROR_STOP=1 --username "${POSTGRES_USER:-postgres}" --dbname postgres \
    --set ledger="$LEDGER_PASSWORD" --set mlflow="$MLFLOW_PASSWORD" <<'SQL'
CREATE ROLE ledger LOGIN PASSWORD :'ledger';
CREATE ROLE mlflow LOGIN PASSWORD :'mlflow';
CREATE DATABASE adapterctl OWNER ledger;
CREATE DATABASE mlflow OWNER mlflow;
REVOKE CONNECT ON DATABASE adapterctl, mlflow FROM PUBLIC;
SQL
