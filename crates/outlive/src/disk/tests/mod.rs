mod bookkeeping;
mod check;
mod journal;
mod pair;
mod power;
mod prepare;
mod replay;
