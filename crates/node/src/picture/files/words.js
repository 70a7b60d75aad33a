// Words and numbers, and the small things that every part needs.

/// Makes an element. Text is text: nothing that a node says is ever read as HTML.
export function element(tag, properties = {}, ...children) {
    const it = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
        if (value !== undefined && value !== null) it.setAttribute(name, value);
    }
    it.append(...children.filter((child) => child !== undefined && child !== null));
    return it;
}

/// Changes a text only if it is another one: a screen reader tells changes.
export function setText(it, text) {
    if (it.textContent !== text) it.textContent = text;
}

export function setClass(it, name) {
    if (it.className !== name) it.className = name;
}

function rounded(value) {
    return value >= 100 || Number.isInteger(value) ? String(Math.round(value)) : value.toPrecision(2);
}

export function micros(us) {
    if (us < 1000) return `${rounded(us)} µs`;
    if (us < 1e6) return `${rounded(us / 1000)} ms`;
    return `${rounded(us / 1e6)} s`;
}

export function bytes(count) {
    if (count < 1024) return `${rounded(count)} B`;
    if (count < 1024 ** 2) return `${rounded(count / 1024)} KiB`;
    if (count < 1024 ** 3) return `${rounded(count / 1024 ** 2)} MiB`;
    return `${rounded(count / 1024 ** 3)} GiB`;
}

export function count(number) {
    return number < 10_000 ? rounded(number) : `${rounded(number / 1000)} k`;
}

/// A span for people, from milliseconds.
export function span(ms) {
    if (ms < 1000) return `${Math.round(ms)} ms`;
    const seconds = ms / 1000;
    if (seconds < 120) return `${Math.round(seconds)} s`;
    if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
    if (seconds < 48 * 3600) return `${Math.round(seconds / 3600)} h`;
    return `${Math.round(seconds / 86400)} days`;
}

/// A time of the day, with the date if that is another one.
export function clock(time) {
    const at = new Date(time);
    const today = at.toDateString() === new Date().toDateString();
    const of_day = at.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false });
    return today ? of_day : `${at.toLocaleDateString([], { month: "short", day: "numeric" })} ${of_day}`;
}

/// "3 of them": a number and its noun.
export function many(number, noun) {
    return `${number} ${noun}${number === 1 ? "" : "s"}`;
}

/// States, each with a sign of its own: colour alone says nothing to some people.
export const STATES = {
    running: { sign: "●", tone: "good" },
    standby: { sign: "◐", tone: "good" },
    deciding: { sign: "◌", tone: "wait" },
    starting: { sign: "◌", tone: "wait" },
    stopping: { sign: "◌", tone: "wait" },
    stopped: { sign: "○", tone: "calm" },
    ended: { sign: "○", tone: "calm" },
    waiting: { sign: "↻", tone: "warn" },
    failed: { sign: "✕", tone: "bad" },
    misdefined: { sign: "✕", tone: "bad" },
    foreign: { sign: "?", tone: "warn" },
};

/// Orders and jobs.
export const KINDS = { start: "Start", stop: "Stop", hand_over: "Hand-over", drain: "Drain" };

/// What happened to a VM, on its time line. Of two at one place the first counts.
export const MARKS = {
    takeover: { sign: "▲", tone: "note", text: "the VM was taken over here" },
    host_fault: { sign: "✕", tone: "bad", text: "KVM, a disk or the network of this host has failed" },
    process_ended: { sign: "✕", tone: "bad", text: "the VM's process has ended" },
    guest_panic: { sign: "!", tone: "bad", text: "the guest's kernel has panicked" },
    protection_lost: { sign: "▼", tone: "bad", text: "the protection was lost" },
    link_lost: { sign: "▼", tone: "bad", text: "the other host was lost" },
    arbiter_lost: { sign: "!", tone: "warn", text: "the arbiter was lost" },
    hand_over: { sign: "→", tone: "note", text: "the VM was handed over to the other host" },
    guest_restart: { sign: "↻", tone: "note", text: "the guest has restarted" },
    process_started: { sign: "•", tone: "note", text: "the VM's process has begun" },
};
