// What is chosen stands in the address after #, to be bookmarked and shared.

const DEFAULTS = { q: "", tier: "", state: "", sort: "trouble", page: "", range: "", axis: "", device: "" };

class Address extends EventTarget {
  constructor() {
    super();
    this.chosen = { ...DEFAULTS };
    addEventListener("hashchange", () => this.read());
    this.read();
  }

  read() {
    const given = new URLSearchParams(location.hash.slice(1));
    for (const [key, usual] of Object.entries(DEFAULTS)) this.chosen[key] = given.get(key) ?? usual;
    this.dispatchEvent(new Event("change"));
  }

  choose(change) {
    Object.assign(this.chosen, change);
    const told = Object.entries(this.chosen).filter(([key, value]) => value !== DEFAULTS[key]);
    history.replaceState(null, "", told.length ? `#${new URLSearchParams(told)}` : location.pathname);
    this.dispatchEvent(new Event("change"));
  }
}

export const address = new Address();
