mod journal;
mod power;
mod replay;
