BEGIN TRANSACTION;
CREATE TABLE entries (
    key TEXT PRIMARY KEY, nbytes INTEGER, tokens INTEGER, model TEXT, tenant TEXT, documents TEXT, chunks TEXT,
    created REAL, used REAL, uses REAL, pinned INTEGER, expires REAL, compute_s REAL
) WITHOUT ROWID;
INSERT INTO "entries" VALUES('56bfa7efe42769aae96a4a4e1665466b011e93bae571775148bcc5d5052cc1cc',162,4,'model','tenant','document','chunk-4',1000.0,1.7958504940816476345e+09,1.0,1,NULL,0.5);
CREATE TABLE ghosts (key TEXT PRIMARY KEY, uses REAL, at REAL) WITHOUT ROWID;
CREATE TABLE seen (key TEXT PRIMARY KEY, times REAL) WITHOUT ROWID;
CREATE TABLE tombs (what TEXT PRIMARY KEY, at REAL) WITHOUT ROWID;
INSERT INTO "tombs" VALUES('[null, "gone", null, null]',1.79585049408169794083e+09);
INSERT INTO "tombs" VALUES('[null, null, "edited", "old"]',1.79585049408192563057e+09);
INSERT INTO "tombs" VALUES('a7d442fa097154d6bc9bb7e58f3e591bce72d2dba754eafc7284caa4976fc30d',1.79585049408202624323e+09);
CREATE INDEX by_size ON entries (tenant, nbytes);
CREATE INDEX by_expiry ON entries (expires);
CREATE INDEX by_death ON tombs (at);
CREATE INDEX by_use ON entries (used);
COMMIT;
PRAGMA user_version=1;
