/* The snapshot protocol as a small model: what is stored, committed, given up, chosen and rebuilt. `test_spin.py` has it
 * checked exhaustively and defines:
 *
 *   NODES, GROUPS   slots, at most 4, and groups of equal size (2 or 3) whose members follow one another; m = 1
 *   SNAPS           snapshots that are offered: 1 ... SNAPS, at most 3; 0 is none
 *   CRASHES, RANKS  agents that are lost with their memory, and deaths of ranks, which lose no memory
 *   BREAK           0, or the number of a rule that is left out, each of which breaks a promise
 *
 * A node learns a fact at any time after it is true: so messages may be late, repeated and overtaken. Workers are as with
 * `when_busy: skip`. A node has two buffers. Promises: SAFE, the assertion at a commit, that a choice is never older than
 * what was committed, and that no state but the end is without a next step (no wedge).
 */

#define SIZE (NODES / GROUPS)
#define AT(n, s) ((n) * (SNAPS + 1) + (s))
#define SEALED 2
#define STORED 3

byte has[NODES * (SNAPS + 1)];  /* 0: nothing, 1: workers write, SEALED: data, STORED: data and parity */
bit said[NODES * (SNAPS + 1)];  /* has announced in this epoch that it is stored */
bit nay[NODES * (SNAPS + 1)];   /* knows that it can never be committed */
bit was[NODES * (SNAPS + 1)];   /* an epoch has restored it, and it is not known to be whole since */
byte com[NODES];                /* the newest snapshot that it knows to be committed */
byte asked[NODES];              /* the newest step that its workers offered */
bit dead[NODES];
bit gone[NODES];                /* has lost its memory and has nothing back yet */
bit frozen[NODES];              /* follows no choice of this epoch yet */
byte phase = 0;                 /* 0: training, 1: an epoch begins, 2: its choice is made and followed one by one */
byte offered = 0, chosen = 0, crashes = 0, ranks = 0;
bit over = 0;                   /* no more faults */
byte safe = 0;                  /* the expectation: the newest that was committed and whole. No choice resets it. */
hidden byte i;

/* The slots, and the members of a group. A slot that is not there repeats another. */
#define N2 (NODES > 2 -> 2 : 0)
#define N3 (NODES > 3 -> 3 : 0)
#define M0(g) ((g) * SIZE)
#define M1(g) ((g) * SIZE + 1)
#define M2(g) ((g) * SIZE + (SIZE > 2 -> 2 : 0))
#define G(n) ((n) / SIZE)

#define OPEN(n, s) (has[AT(n, s)] > 0 && s > com[n] && s != chosen && !nay[AT(n, s)] && !was[AT(n, s)])
#define FULL(n, s) (has[AT(n, s)] == STORED)
#define DATA(n, s) (has[AT(n, s)] >= SEALED)
#define ALL_DATA(g, s) (DATA(M0(g), s) && DATA(M1(g), s) && DATA(M2(g), s))
#define COUNT(g, s) (FULL(M0(g), s) + FULL(M1(g), s) + (SIZE > 2 && FULL(M2(g), s)))
#define DECODES(g, s) (ALL_DATA(g, s) || COUNT(g, s) >= SIZE - 1)
#define DECODABLE(s) (DECODES(0, s) && DECODES(GROUPS - 1, s))
#define SAFE assert(safe == 0 || DECODABLE(safe))
#define SAID(s) (said[AT(0, s)] + said[AT(1, s)] + (NODES > 2 && said[AT(N2, s)]) + (NODES > 3 && said[AT(N3, s)]))
#define ALL_SAID(s) (SAID(s) >= NODES - (BREAK == 2 -> 1 : 0))
#define ALL_FROZEN (frozen[0] && frozen[1] && frozen[N2] && frozen[N3] && !dead[0] && !dead[1] && !dead[N2] && !dead[N3])
#define ALL_JOINED (!frozen[0] && !frozen[1] && !frozen[N2] && !frozen[N3])
#define ALL_ASKED (asked[0] == offered && asked[1] == offered && asked[N2] == offered && asked[N3] == offered)
#define SAYS_NAY(n, s) (!frozen[n] && nay[AT(n, s)])
#define ANY_NAY(s) (SAYS_NAY(0, s) || SAYS_NAY(1, s) || SAYS_NAY(N2, s) || SAYS_NAY(N3, s))
#define SOUND(n, k) (k == n || (!dead[k] && !gone[k] && (safe == 0 || FULL(k, safe))))
#define MAY_CRASH(n) (SOUND(n, M0(G(n))) && SOUND(n, M1(G(n))) && SOUND(n, M2(G(n))))
#define HOLDS(n, s) (has[AT(n, s)] > 0)
#define S2 (SNAPS > 1 -> 2 : 1)
#define S3 (SNAPS > 2 -> 3 : 1)
#define ANY_OPEN(n) (OPEN(n, 1) || OPEN(n, S2) || OPEN(n, S3))
#define ROOM(n) (!ANY_OPEN(n) && HOLDS(n, 1) + (SNAPS > 1 && HOLDS(n, S2)) + (SNAPS > 2 && HOLDS(n, S3)) < 2)
#define QUIET (!ANY_OPEN(0) && !ANY_OPEN(1) && !ANY_OPEN(N2) && !ANY_OPEN(N3))
#define DONE (phase == 0 && over && offered == SNAPS && ALL_ASKED && QUIET)

#define EACH(action) i = 1; do :: i > SNAPS -> break :: else -> action; i++ od
#define WHEN(condition, action) if :: condition -> action :: else fi

/* A worker asks, and so has completed a step from the choice: what was given up is freed. BREAK 3 passes in silence. */
inline ask(n) {
  asked[n]++;
  EACH(WHEN(nay[AT(n, i)] && i != chosen, has[AT(n, i)] = 0; was[AT(n, i)] = 0));
  if
  :: nay[AT(n, asked[n])]
  :: !nay[AT(n, asked[n])] && ROOM(n) -> has[AT(n, asked[n])] = 1
  :: !nay[AT(n, asked[n])] && !ROOM(n) -> WHEN(BREAK != 3, nay[AT(n, asked[n])] = 1)
  fi;
  SAFE
}

/* Every slot has stored it, or a fault has taken it since. Older snapshots are freed. */
inline commit(n, s) {
  i = 0;
  do
  :: i == NODES -> break
  :: else -> assert(FULL(i, s) || gone[i] || com[i] > s); i++
  od;
  com[n] = s;
  WHEN(s > safe, safe = s);
  EACH(WHEN(i < s, has[AT(n, i)] = 0); WHEN(i <= s, was[AT(n, i)] = 0));
  SAFE
}

inline crash(n) {
  crashes++;
  dead[n] = 1; gone[n] = 1; frozen[n] = 1; com[n] = 0;
  EACH(has[AT(n, i)] = 0; nay[AT(n, i)] = 0; was[AT(n, i)] = 0);
  phase = 1;
  SAFE
}

inline freeze(n) {
  frozen[n] = 1;
  EACH(nay[AT(n, i)] = 0; WHEN(has[AT(n, i)] == 1, has[AT(n, i)] = 0));
  i = 0
}

/* What stays beside the choice: the older one that an epoch has restored, if that may be all that is whole. BREAK 6: not. */
#define BESIDE(n, s) (was[AT(n, s)] && s < chosen && BREAK != 6)

/* A choice frees nothing. BREAK 1 frees all but what was chosen. */
inline join(n) {
  frozen[n] = 0;
  asked[n] = offered;
  WHEN(FULL(n, chosen), said[AT(n, chosen)] = 1);
  EACH(WHEN(i != chosen && i > com[n] && i <= offered && !BESIDE(n, i), nay[AT(n, i)] = 1); WHEN(BREAK == 1 && i != chosen, has[AT(n, i)] = 0));
  WHEN(chosen > com[n], was[AT(n, chosen)] = 1);
  WHEN(ALL_JOINED, phase = 0);
  SAFE
}

inline rebuild(n) {
  has[AT(n, chosen)] = STORED;
  said[AT(n, chosen)] = 1;
  gone[n] = 0
}

/* The newest that decodes. BREAK 5 takes the one before it. */
inline choose() {
  chosen = SNAPS;
  do
  :: chosen == 0 -> break
  :: chosen > 0 && DECODABLE(chosen) -> break
  :: chosen > 0 && !DECODABLE(chosen) -> chosen--
  od;
  WHEN(BREAK == 5 && chosen > 0, chosen--);
  assert(chosen >= safe);
  i = 0;
  do
  :: i == NODES * (SNAPS + 1) -> break
  :: else -> said[i] = 0; i++
  od;
  WHEN(chosen == 0, gone[0] = 0; gone[1] = 0; gone[N2] = 0; gone[N3] = 0);
  phase = 2
}

#define HERE !frozen[_pid]
#define OF_SNAPSHOT(s) \
  :: d_step { HERE && has[AT(_pid, s)] == 1 -> has[AT(_pid, s)] = SEALED } \
  :: d_step { HERE && OPEN(_pid, s) && has[AT(_pid, s)] == SEALED && (ALL_DATA(G(_pid), s) || BREAK == 4) && !said[AT(_pid, s)] -> \
       WHEN(ALL_DATA(G(_pid), s), has[AT(_pid, s)] = STORED; gone[_pid] = 0); said[AT(_pid, s)] = 1 } \
  :: d_step { HERE && com[_pid] < s && ALL_SAID(s) -> commit(_pid, s) } \
  :: d_step { HERE && !nay[AT(_pid, s)] && s > com[_pid] && s != chosen && !was[AT(_pid, s)] && ANY_NAY(s) -> \
       WHEN(OPEN(_pid, s), has[AT(_pid, s)] = 0); nay[AT(_pid, s)] = 1 }

active [NODES] proctype node() {
  do
  :: d_step { HERE && phase == 0 && asked[_pid] < offered -> ask(_pid) }
  OF_SNAPSHOT(1)
#if SNAPS > 1
  OF_SNAPSHOT(2)
#endif
#if SNAPS > 2
  OF_SNAPSHOT(3)
#endif
  :: d_step { HERE && phase != 1 && chosen > 0 && !FULL(_pid, chosen) && DECODABLE(chosen) -> rebuild(_pid) }
  :: d_step { phase == 1 && dead[_pid] -> dead[_pid] = 0 }
  :: d_step { phase == 1 && HERE -> freeze(_pid) }
  :: d_step { phase == 2 && frozen[_pid] -> join(_pid) }
  :: d_step { !over && crashes < CRASHES && !dead[_pid] && MAY_CRASH(_pid) -> crash(_pid) }
  :: DONE -> break
  od
}

active proctype training() {
  do
  :: d_step { phase == 0 && offered < SNAPS && ALL_ASKED -> offered++ }
  :: d_step { phase == 1 && ALL_FROZEN -> choose() }
  :: d_step { !over && ranks < RANKS && phase == 0 -> ranks++; phase = 1 }
  :: d_step { !over -> over = 1 }
  :: DONE -> break
  od
}
