BEGIN TRANSACTION;
CREATE TABLE entries (
    key TEXT PRIMARY KEY, nbytes INTEGER, tokens INTEGER, model TEXT, tenant TEXT, documents TEXT, chunks TEXT,
    created REAL, used REAL, uses REAL, pinned INTEGER, expires REAL, compute_s REAL
) WITHOUT ROWID;
INSERT INTO "entries" VALUES('99f3f6325399cf88b11c899fe54b0dca1fc1b36e303bacc563487592b89f2f16',384,3,'model','tenant','document','chunk-1',1000.0,1.79585049407331562038e+09,1.0,1,NULL,0.5);
CREATE TABLE ghosts (key TEXT PRIMARY KEY, uses REAL, at REAL) WITHOUT ROWID;
CREATE TABLE seen (key TEXT PRIMARY KEY, times REAL) WITHOUT ROWID;
CREATE TABLE tombs (what TEXT PRIMARY KEY, at REAL) WITHOUT ROWID;
INSERT INTO "tombs" VALUES('[null, "gone", null, null]',1.79585049407337856287e+09);
INSERT INTO "tombs" VALUES('[null, null, "edited", "old"]',1.79585049407363390918e+09);
INSERT INTO "tombs" VALUES('a7d442fa097154d6bc9bb7e58f3e591bce72d2dba754eafc7284caa4976fc30d',1.79585049407374382018e+09);
CREATE INDEX by_size ON entries (tenant, nbytes);
CREATE INDEX by_expiry ON entries (expires);
CREATE INDEX by_death ON tombs (at);
CREATE INDEX by_use ON entries (used);
COMMIT;
PRAGMA user_version=1;
