// What is known of the fleet: asks the trainer for what is new, and keeps the rest.

const EVERY_MS = 2000;
const SLOWEST_MS = 30000;
const MOST_POINTS = 4000; // then they are asked for anew, thinned out by the trainer
const MOST_EVENTS = 300;

export class Fleet extends EventTarget {
  constructor() {
    super();
    this.devices = new Map();
    this.points = [];
    this.refusals = [];
    this.events = [];
    this.labels = null;
    this.view = null;
    this.failures = 0;
    this.heardAt = 0;
    this.board = "";
    this.revision = 0;
  }

  start() {
    const loop = async () => {
      if (!document.hidden) await this.ask();
      setTimeout(loop, Math.min(SLOWEST_MS, EVERY_MS * 2 ** Math.min(this.failures, 4)));
    };
    document.addEventListener("visibilitychange", () => { if (!document.hidden) this.ask(); });
    loop();
  }

  async ask() {
    try {
      const query = new URLSearchParams({ board: this.board, since: this.revision });
      const answer = await fetch(`api/fleet?${query}`, { cache: "no-store", signal: AbortSignal.timeout(20000) });
      if (!answer.ok) throw new Error(`status ${answer.status}`);
      this.take(await answer.json());
      this.failures = 0;
    } catch {
      this.failures += 1;
    }
    this.dispatchEvent(new Event("change"));
  }

  take(view) {
    if (view.board === this.view?.board && view.revision < this.revision) return; // an older answer came late
    if (view.whole) { this.devices.clear(); this.points = []; this.events = []; this.labels = null; }
    for (const device of view.devices) this.devices.set(`${device.tier}/${device.name}`, device);
    this.points.push(...view.points);
    if (view.refusals) this.refusals = view.refusals;
    else if (view.whole) this.refusals = [];
    this.events = [...this.events, ...(view.events ?? [])].slice(-MOST_EVENTS);
    this.labels = view.labels ?? this.labels;
    Object.assign(this, { view, board: view.board, revision: view.revision, heardAt: Date.now() });
    if (this.points.length > MOST_POINTS) this.board = "";
  }

  // Change a second of a counter up to point i, over ten seconds or a twentieth of the run.
  rateAt(i, field) {
    const points = this.points;
    const over_s = Math.max(10, (points[points.length - 1].at_unix_s - points[0].at_unix_s) / 20);
    let j = i - 1;
    while (j > 0 && points[i].at_unix_s - points[j - 1].at_unix_s <= over_s) j -= 1;
    if (j < 0) return null;
    const passed = points[i].at_unix_s - points[j].at_unix_s;
    return passed > 0 ? Math.max(0, (points[i][field] ?? 0) - (points[j][field] ?? 0)) / passed : null;
  }
}
