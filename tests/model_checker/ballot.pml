/* The votes of `keepwarm.ft.protocol.ballot` as a small model. `test_spin.py` has it checked exhaustively and defines:
 *
 *   NODES     slots, 2 to 4
 *   EPOCHS    epochs, which begin at any time and in any order
 *   LOSSES    how often a slot loses its memory and gets a new agent
 *   LEFT_OUT  a slot that choices may leave out, NODES for none
 *   FRESH     1 if no slot has followed any choice yet
 *   BREAK     0, or the number of a rule that is left out, each of which breaks the promise
 *
 * The lowest and the highest slot may each propose one choice in an epoch. It names the agents that it takes into account
 * by their generations, from 1 on; every new memory has another one. A message may arrive at any time or never: so a slot
 * is asked to vote, a vote is counted and a choice is followed at any time after, though not by an agent that was not
 * there yet. Choices that stand by the folder are not modelled. Promise: no two agents ever follow different choices of
 * one epoch, unless more than half of the slots have forgotten their votes in it.
 */

#define CHOICES (EPOCHS * 2)
#define C(e, p) ((e) * 2 + (p > 0))
#define E(c) ((c) / 2)
#define MAJORITY (NODES / 2 + 1)
#define HALF (NODES - NODES / 2)
#define N(c, n) ((c) * NODES + (n))
#define FOLLOWS(n, c) (follows[(n) * EPOCHS + E(c)] == c + 1)
#define TOLD(c) (FOLLOWS(0, c) || FOLLOWS(1, c) || FOLLOWS(N2, c) || FOLLOWS(N3, c))
#define N2 (NODES > 2 -> 2 : 0)
#define N3 (NODES > 3 -> 3 : 0)

byte generation[NODES];          /* of the agent that a slot has */
bit old[NODES];                  /* it has followed a choice that names it */
byte epoch[NODES];               /* it takes no part in earlier ones */
byte cast[NODES * EPOCHS];       /* what it has voted for, plus 1 */
byte latest[NODES * NODES];      /* the generations that it knows of */
bit made[CHOICES];
byte named[CHOICES * NODES];
bit votes[CHOICES * NODES];      /* has ever been cast, by any agent of the slot */
bit older[CHOICES * NODES];      /* and that was not a new one */
bit stands[CHOICES];
byte follows[NODES * EPOCHS];    /* the choice that the present agent follows, plus 1 */
byte forgot[EPOCHS];             /* votes of an epoch that were lost with their memory */
bit missed[CHOICES * NODES];     /* it was proposed before the agent of the slot was there: only who follows it can tell */
byte losses = 0;
hidden byte i, k, sum, agreed;

/* The choice names all agents or leaves out one, that of slot `without`. */
inline propose(p, e, without) {
  made[C(e, p)] = 1;
  epoch[p] = e;
  i = 0;
  do
  :: i == NODES -> break
  :: i < NODES -> named[N(C(e, p), i)] = (i == without -> 0 : generation[i]); i++
  od
}

/* Rules 2 and 3: a new one only for a choice that names it, and none for one that names an agent known to be gone. */
inline may_vote(n, c) {
  agreed = (named[N(c, n)] > 0);
  if :: BREAK != 2 && !old[n] && named[N(c, n)] != generation[n] -> agreed = 0 :: else fi;
  i = 0;
  do
  :: i == NODES -> break
  :: i < NODES ->
     if :: BREAK != 3 && named[N(c, i)] > 0 && named[N(c, i)] < latest[n * NODES + i] -> agreed = 0 :: else fi;
     i++
  od
}

inline learn(n, c) {
  i = 0;
  do
  :: i == NODES -> break
  :: i < NODES ->
     if :: named[N(c, i)] > latest[n * NODES + i] -> latest[n * NODES + i] = named[N(c, i)] :: else fi;
     i++
  od
}

/* Rule 1: the votes of new ones are not enough. */
inline vote(n, c) {
  may_vote(n, c);
  if
  :: agreed ->
     cast[n * EPOCHS + E(c)] = c + 1; epoch[n] = E(c);
     learn(n, c);
     votes[N(c, n)] = 1;
     if :: old[n] || BREAK == 1 -> older[N(c, n)] = 1 :: else fi;
     sum = 0; k = 0; i = 0;
     do
     :: i == NODES -> break
     :: i < NODES -> sum = sum + votes[N(c, i)]; k = k + older[N(c, i)]; i++
     od;
     if :: sum == NODES || (sum >= MAJORITY && k >= HALF) -> stands[c] = 1 :: else fi
  :: else
  fi
}

inline follow(n, c) {
  follows[n * EPOCHS + E(c)] = c + 1;
  epoch[n] = E(c);
  learn(n, c);
  if :: named[N(c, n)] == generation[n] -> old[n] = 1 :: else fi;
  i = 0;
  do
  :: i == NODES -> break
  :: i < NODES ->
     assert(follows[i * EPOCHS + E(c)] == 0 || FOLLOWS(i, c) || forgot[E(c)] > NODES / 2);
     i++
  od
}

inline lose(n) {
  losses++;
  generation[n]++;
  old[n] = 0; epoch[n] = 0;
  i = 0;
  do
  :: i == EPOCHS -> break
  :: i < EPOCHS ->
     if :: cast[n * EPOCHS + i] > 0 -> forgot[i]++ :: else fi;
     cast[n * EPOCHS + i] = 0; follows[n * EPOCHS + i] = 0; i++
  od;
  i = 0;
  do
  :: i == NODES -> break
  :: i < NODES -> latest[n * NODES + i] = 0; i++
  od;
  i = 0;
  do
  :: i == CHOICES -> break
  :: i < CHOICES -> missed[N(i, n)] = made[i]; i++
  od
}

#define MAY(n, e) (follows[(n) * EPOCHS + (e)] == 0 && epoch[n] <= (e))
#define ANY(n, c) \
  :: d_step { made[c] && cast[n * EPOCHS + E(c)] == 0 && MAY(n, E(c)) -> vote(n, c); i = 0 } \
  :: d_step { stands[c] && (!missed[N(c, n)] || TOLD(c)) && MAY(n, E(c)) -> follow(n, c); i = 0 }
#define PROPOSES(n, e, without) :: d_step { (n == 0 || n == NODES - 1) && n != without && !made[C(e, n)] && MAY(n, e) -> propose(n, e, without); i = 0 }
#define IN(n, e) \
  PROPOSES(n, e, NODES) PROPOSES(n, e, LEFT_OUT) ANY(n, C(e, 0)) ANY(n, C(e, 1))

active [NODES] proctype node() {
  d_step { generation[_pid] = 1; old[_pid] = !FRESH };
  do
  IN(_pid, 0)
#if EPOCHS > 1
  IN(_pid, 1)
#endif
  :: d_step { losses < LOSSES -> lose(_pid); i = 0 }
  :: else -> break
  od
}
