// The key of a station that has keys: asked for once, kept until the browser's tab is closed.
const NAME = 'gladad.key';

export const access = $state({ needed: false, wrong: false });
let waiting: (() => void)[] = [];

export const key = () => sessionStorage.getItem(NAME);

/** Wait until a person has given a key. */
export function askForKey(wrong: boolean): Promise<void> {
  access.needed = true;
  access.wrong = wrong;
  return new Promise((done) => waiting.push(done));
}

export function giveKey(value: string): void {
  sessionStorage.setItem(NAME, value);
  access.needed = false;
  const all = waiting;
  waiting = [];
  for (const done of all) done();
}

export function forgetKey(): void {
  sessionStorage.removeItem(NAME);
  location.reload();
}
